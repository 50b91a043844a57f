/** The gauge: how a quantity went as the conversation grew, drawn from zero so that flat is flat. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Points [tokens, value] as [x, y] in a box, and the SVG path through them. The box begins at zero tokens and at zero;
 * it is a third higher than the highest value. Of points too close to be told apart, the median is drawn.
 */
export function plot(points, { width, height, margin = 3, apart = 3 }) {
  const most = Math.max(1, ...points.map(([at]) => at));
  const columns = new Map();
  for (const [at, value] of points) {
    const column = Math.round(((at / most) * (width - 2 * margin)) / apart);
    columns.set(column, [...(columns.get(column) ?? []), value]);
  }
  const drawn = [...columns].map(([column, values]) => [column, median(values)]);
  const highest = Math.max(...drawn.map(([, value]) => value), 0) * (4 / 3) || 1;
  const round = (number) => Math.round(number * 10) / 10;
  const places = drawn.map(([column, value]) => [
    round(margin + column * apart),
    round(height - margin - (value / highest) * (height - 2 * margin)),
  ]);
  return { places, path: places.map(([x, y], index) => `${index ? "L" : "M"}${x} ${y}`).join("") };
}

export function median(values) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[sorted.length >> 1];
}

/** The same in words. */
export function describe(points, { what, value }) {
  if (points.length === 0) return `${what}: nothing measured yet`;
  const say = ([at, amount]) => `${value(amount)} at ${at.toLocaleString("en")} tokens`;
  const ends = points.length === 1 ? [points[0]] : [points[0], points.at(-1)];
  return `${what}: ${ends.map(say).join(", ")}`;
}

export function draw(svg, points, words) {
  const { width, height } = svg.getBoundingClientRect();
  const { places, path } = plot(points, { width, height });
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const shape = (tag, attributes) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  svg.setAttribute("aria-label", describe(points, words));
  svg.replaceChildren(shape("path", { class: "ground", d: `M0 ${height - 0.5}H${width}` }));
  if (places.length === 0) return;
  const [x, y] = places.at(-1);
  svg.append(shape("path", { class: "line", d: path }), shape("circle", { class: "now", cx: x, cy: y, r: 2.5 }));
}
