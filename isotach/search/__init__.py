"""Which mixer in which layer: one supernet holds every pattern, evolution looks for the best ones at a cost."""
