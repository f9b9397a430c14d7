"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };

  function unpack(part) {
    if (!part) return null;
    const text = atob(part.base64), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new ARRAYS[part.type](bytes.buffer);
  }

  // ---- matrices -----------------------------------------------------------------------------------------------
  const mapOf = unpack(data.map), rowOf = unpack(data.row), columnOf = unpack(data.column);
  const alpha = unpack(data.alpha), error = unpack(data.error), measured = unpack(data.measured);
  const planChoice = unpack(data.choice), weights = unpack(data.weights);
  const COUNT = mapOf.length, choices = data.choices, bitsOfChoice = choices.map((one) => one.bits);
  const offered = [...new Set(bitsOfChoice)].sort((a, b) => a - b);
  const which = unpack(data.names.which), numbers = unpack(data.names.numbers), firstNumber = new Uint32Array(COUNT);
  for (let i = 0, at = 0; i < COUNT; i++) {
    firstNumber[i] = at;
    at += data.names.templates[which[i]].numbers;
  }
  function nameOf(i) {
    const template = data.names.templates[which[i]];
    let at = firstNumber[i];
    return template.numbers ? template.text.replace(/#/g, () => numbers[at++]) : template.text;
  }

  // ---- the path of budgets ------------------------------------------------------------------------------------
  const P = data.path && (() => {
    const raw = data.path, climbs = unpack(raw.climbs), columns = unpack(raw.stepColumn), saved = unpack(raw.saved), steps = columns.length;
    const path = {
      unit: unpack(raw.unit), start: unpack(raw.start), startLoss: unpack(raw.startLoss), costOf: unpack(raw.costOf), costs: unpack(raw.costs),
      planColumn: unpack(raw.planColumn), width: raw.columns.length, choice: raw.columns, steps, planCost: raw.planCost, planLoss: raw.planLoss,
      unitOfCost: raw.unitOfCost, stepUnit: new Uint32Array(steps), stepColumn: new Uint8Array(steps), before: new Uint8Array(steps),
      saved: new Float32Array(steps), cost: new Float64Array(steps + 1), loss: new Float64Array(steps + 1),
    };
    path.costAt = (unit, column) => path.costs[path.costOf[unit] * path.width + column];
    const rate = new Float32Array(steps), owner = new Uint32Array(steps), from = new Uint8Array(steps);
    for (let unit = 0, k = 0; unit < climbs.length; unit++) {
      let now = path.start[unit], last = Infinity;
      for (const end = k + climbs[unit]; k < end; k++) {
        owner[k] = unit;
        from[k] = now;
        // Rounding must not let a unit's later step go first.
        rate[k] = last = Math.min(last, saved[k] / (path.costAt(unit, columns[k]) - path.costAt(unit, now)));
        now = columns[k];
      }
    }
    const order = descending(rate);
    path.cost[0] = raw.startCost;
    for (let k = 0; k < steps; k++) {
      const at = order[k], unit = (path.stepUnit[k] = owner[at]), to = (path.stepColumn[k] = columns[at]);
      path.before[k] = from[at];
      path.saved[k] = saved[at];
      path.cost[k + 1] = path.cost[k] + path.costAt(unit, to) - path.costAt(unit, from[at]);
    }
    path.loss[steps] = raw.finalLoss;
    for (let k = steps; k > 0; k--) path.loss[k - 1] = path.loss[k] + path.saved[k - 1];
    path.members = new Uint32Array(path.start.length);
    for (let i = 0; i < COUNT; i++) path.members[path.unit[i]]++;
    return path;
  })();
  function descending(values) {  // stable radix sort: positive floats sort as their bits do; a million take 30 ms
    const bits = new Uint32Array(values.buffer), count = bits.length;
    let order = new Uint32Array(count), next = new Uint32Array(count);
    for (let i = 0; i < count; i++) order[i] = i;
    for (const shift of [0, 11, 22]) {
      const starts = new Uint32Array(2049);
      for (let i = 0; i < count; i++) starts[((~bits[i] >>> shift) & 2047) + 1]++;
      for (let b = 0; b < 2048; b++) starts[b + 1] += starts[b];
      for (let i = 0; i < count; i++) next[starts[(~bits[order[i]] >>> shift) & 2047]++] = order[i];
      [order, next] = [next, order];
    }
    return order;
  }
  const bytes = P && P.unitOfCost === "bytes", sized = bytes && data.plan.size_bytes !== null;
  const sizeAt = (cost) => (sized ? data.plan.size_bytes + cost - P.planCost : cost);
  function stepsWithin(budget) {
    let low = 0, high = P.steps;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (P.cost[middle] <= budget) low = middle; else high = middle - 1;
    }
    return low;
  }

  if (P) P.planStep = stepsWithin(P.planCost + data.path.slack);

  // ---- state: which plan is shown, which matrix is selected -----------------------------------------------------
  const state = { step: P ? P.planStep : 0, own: true, selected: -1 };
  const column = P && P.start.slice();  // of each unit after `walked` steps
  let walked = 0;
  function walk(to) {
    for (; walked < to; walked++) column[P.stepUnit[walked]] = P.stepColumn[walked];
    for (; walked > to; walked--) column[P.stepUnit[walked - 1]] = P.before[walked - 1];
  }
  const choiceOf = (i) => (state.own || !P ? planChoice[i] : P.choice[column[P.unit[i]]]);
  const bitsOf = (i) => bitsOfChoice[choiceOf(i)];

  // ---- words and colours --------------------------------------------------------------------------------------
  const group = (value) => Math.round(value).toLocaleString("en-US");
  const figures = (value, digits = 4) => {
    if (!isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1000 && size < 1e9) return group(+value.toPrecision(digits));
    return size !== 0 && (size < 1e-3 || size >= 1e9) ? value.toExponential(digits - 1).replace("e+", "e") : String(+value.toPrecision(digits));
  };
  function human(count) {
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (Math.abs(count) < 1024) return unit === "B" ? `${Math.round(count)} B` : `${count.toFixed(2)} ${unit}`;
      count /= 1024;
    }
    return `${count.toFixed(2)} TiB`;
  }
  const amount = (cost) => (bytes ? human(sizeAt(cost)) : `${group(cost)} ${P.unitOfCost}`);
  const plural = (bits) => `${bits} bit${bits === 1 ? "" : "s"}`;
  let theme = {};
  function readTheme() {
    const style = getComputedStyle(document.documentElement), css = (name) => style.getPropertyValue(name).trim();
    theme = { ink: css("--ink"), soft: css("--soft"), line: css("--line"), card: css("--card"), accent: css("--accent"), mark: css("--mark"), none: css("--none"), bits: {} };
    for (const bits of offered) {  // fractions lie between the colours of whole bits
      const [low, high] = [Math.floor(bits), Math.ceil(bits)].map((whole) => rgb(css(`--b${whole}`)));
      theme.bits[bits] = `#${low.map((value, k) => Math.round(value + (high[k] - value) * (bits % 1)).toString(16).padStart(2, "0")).join("")}`;
    }
    theme.methods = isDark() ? ["#56b4e9", "#e69f00", "#2bb58c", "#f0e442", "#d98cc0", "#ef7d3c", "#b9c0c8", "#8aa2ff"] : ["#0072b2", "#b87500", "#00805c", "#8a7d00", "#b0578d", "#c4500a", "#4a525b", "#4a5bd0"];
  }
  const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"].map(rgb);
  function rgb(text) {
    const value = text.length === 4 ? text.slice(1).replace(/./g, "$&$&") : text.slice(1);
    return [0, 2, 4].map((at) => parseInt(value.slice(at, at + 2), 16));
  }
  function cividis(position) {
    const at = Math.min(1, Math.max(0, position)) * (CIVIDIS.length - 1), low = Math.min(CIVIDIS.length - 2, Math.floor(at));
    return CIVIDIS[low].map((value, k) => Math.round(value + (CIVIDIS[low + 1][k] - value) * (at - low)));
  }
  const inkOn = (c) => (0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] > 125 ? "#0b1215" : "#ffffff");

  let alphaLow = Infinity, alphaHigh = -Infinity;
  const known = [];
  for (let i = 0; i < COUNT; i++) if (!isNaN(alpha[i])) known.push(alpha[i]);
  known.sort((a, b) => a - b);
  const hasAlpha = known.length > 0;
  if (hasAlpha) {  // one odd matrix must not take the colours from all others
    alphaLow = known[Math.floor(0.002 * known.length)];
    alphaHigh = known[Math.min(known.length - 1, Math.ceil(0.998 * known.length) - 1)];
  }
  const heat = (value) => cividis(1 - (value - alphaLow) / (alphaHigh - alphaLow || 1));
  function rankOf(value) {
    let low = 0, high = known.length;
    while (low < high) { const middle = (low + high) >> 1; if (known[middle] < value) low = middle + 1; else high = middle; }
    return low + 1;
  }

  // ---- small drawing tools ------------------------------------------------------------------------------------
  const SVG = "http://www.w3.org/2000/svg";
  function draw(parent, tag, attributes, text) {
    const element = document.createElementNS(SVG, tag);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    parent.appendChild(element);
    return element;
  }
  function make(parent, tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    parent.appendChild(element);
    return element;
  }
  function ticks(low, high, log, most) {
    const found = [];
    if (log) {
      const factors = high / low > 1e3 ? [1] : high / low > 12 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 6, 8];
      const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), every = Math.max(1, Math.ceil((last - first) / most));
      for (let power = first; power <= last; power++) {
        if ((power - first) % every) continue;
        for (const factor of factors) found.push(factor * 10 ** power);
      }
    } else {
      const rough = (high - low) / most, base = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 2.5, 5, 10].map((factor) => factor * base).find((value) => value >= rough * 0.999);
      for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-12) + step * 1e-9; k++) found.push(k * step);
    }
    return found.filter((value) => value >= low * (low > 0 ? 0.9999 : 1) - 1e-300 && value <= high * 1.0001);
  }
  const short = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return power10(value);
    return size >= 1e4 ? group(value) : String(+value.toPrecision(4));
  };
  function power10(value) {
    const size = Math.abs(value), power = Math.floor(Math.log10(size) + 1e-9), front = +(value / 10 ** power).toPrecision(3);
    return `${front === 1 ? "" : `${front}·`}10${[...String(power)].map((digit) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(digit)]).join("")}`;
  }
  const formatOf = (axis) => (axis.log && axis.high / axis.low >= 1e4 ? power10 : short);  // all alike on one axis
  function frame(place, x, y, label, options = {}) {
    place.replaceChildren();
    const box = place.getBoundingClientRect(), width = box.width, height = box.height;
    const left = 58, right = options.right || 16, top = 20, bottom = 42;
    const canvas = options.canvas ? make(place, "canvas") : null;
    const svg = draw(place, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    const scale = (axis, from, to) => {
      const at = axis.log ? Math.log : (value) => value, low = at(axis.low), span = at(axis.high) - low || 1;
      return (value) => from + ((at(value) - low) / span) * (to - from);
    };
    const fx = scale(x, left, width - right), fy = scale(y, height - bottom, top);
    for (const value of ticks(y.low, y.high, y.log, 6)) {
      draw(svg, "line", { class: "grid", x1: left, x2: width - right, y1: fy(value), y2: fy(value) });
      draw(svg, "text", { x: left - 7, y: fy(value) + 4, "text-anchor": "end" }, formatOf(y)(value));
    }
    for (const value of ticks(x.low, x.high, x.log, Math.max(3, Math.floor((width - left - right) / 90)))) {
      draw(svg, "line", { class: "axis", x1: fx(value), x2: fx(value), y1: height - bottom, y2: height - bottom + 4 });
      draw(svg, "text", { x: fx(value), y: height - bottom + 17, "text-anchor": "middle" }, formatOf(x)(value));
    }
    draw(svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });
    draw(svg, "text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x.name);
    draw(svg, "text", { x: 4, y: 12 }, y.name);
    if (canvas) {
      const ratio = devicePixelRatio || 1;
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      canvas.getContext("2d").scale(ratio, ratio);
    }
    return { svg, canvas, fx, fy, left, right: width - right, top, bottom: height - bottom, width, height };
  }
  function pathOf(points) {
    return points.map(([x, y], k) => `${k ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  }
  function shape(k, x, y, r) {
    const poly = (points) => `M${points.map(([a, b]) => `${(x + a * r).toFixed(1)} ${(y + b * r).toFixed(1)}`).join("L")}Z`;
    switch (k % 6) {
      case 0: return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
      case 1: return poly([[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]);
      case 2: return poly([[0, -1.15], [1.1, 0.85], [-1.1, 0.85]]);
      case 3: return poly([[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]]);
      case 4: return poly([[0, 1.15], [1.1, -0.85], [-1.1, -0.85]]);
      default: return poly([[-1.2, -0.4], [-0.4, -0.4], [-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4]]);
    }
  }

  // ---- heat maps ----------------------------------------------------------------------------------------------
  const maps = data.maps.map((map, number) => {
    const cells = new Int32Array(map.rows.length * map.columns.length).fill(-1);
    for (let i = 0; i < COUNT; i++) if (mapOf[i] === number) cells[rowOf[i] * map.columns.length + columnOf[i]] = i;
    return { ...map, cells, views: [] };
  });
  const cellText = offered.some((bits) => bits % 1) ? 27 : 11;  // the narrowest cell that its bits can be read in
  function buildMaps() {
    const place = byId("maps");
    for (const map of maps) {
      const pair = make(place, "div", map.columns.length > 80 || !hasAlpha ? "pair wide" : "pair");
      for (const kind of hasAlpha ? ["alpha", "bits"] : ["bits"]) {
        const holder = make(pair, "div", "map"), title = make(holder, "h3", "", `${map.title} `);
        make(title, "span", "", kind === "alpha" ? "α" : "bits");
        const canvas = make(make(holder, "div", "scroll"), "canvas");
        canvas.tabIndex = 0;
        canvas.setAttribute("role", "application");
        canvas.setAttribute("aria-roledescription", "heat map");
        canvas.setAttribute("aria-label", `${map.title}, ${kind === "alpha" ? "α" : "bits"}: ${map.rows.length} layers by ${map.columns.length} ${map.experts ? "experts" : "projections"}. Arrow keys move.`);
        const view = { map, kind, canvas, image: document.createElement("canvas") };
        view.image.width = map.columns.length;
        view.image.height = map.rows.length;
        map.views.push(view);
        canvas.addEventListener("click", (event) => { const i = cellAt(view, event); if (i >= 0) select(i, true); });
        canvas.addEventListener("pointermove", (event) => { const i = cellAt(view, event); tip(event, i < 0 ? "" : words(i)); });
        canvas.addEventListener("pointerleave", () => tip(null, ""));
        canvas.addEventListener("focus", () => { if (state.selected < 0 || mapOf[state.selected] !== maps.indexOf(map)) select(map.cells.find((i) => i >= 0)); });
        canvas.addEventListener("keydown", (event) => move(view, event));
      }
    }
  }
  function move(view, event) {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e6], End: [0, 1e6], PageUp: [-10, 0], PageDown: [10, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    const { map } = view, within = state.selected >= 0 && maps[mapOf[state.selected]] === map;
    let row = within ? rowOf[state.selected] : 0, col = within ? columnOf[state.selected] : 0;
    row = Math.min(map.rows.length - 1, Math.max(0, row + by[0]));
    col = Math.min(map.columns.length - 1, Math.max(0, col + by[1]));
    const i = map.cells[row * map.columns.length + col];
    if (i >= 0) select(i);
  }
  function layout(view) {
    const { map, canvas } = view, space = canvas.parentNode.clientWidth;
    view.left = 30;
    view.bottom = 18;
    const wide = map.experts ? 52 : 90;
    view.w = Math.max(2, Math.min(wide, (space - view.left - 2) / map.columns.length));
    view.h = Math.max(5, Math.min(26, Math.max(view.w * 0.8, Math.floor(420 / map.rows.length))));
    if (view.w >= cellText) view.h = Math.max(view.h, 18);
    const width = Math.ceil(view.left + view.w * map.columns.length + 2), height = Math.ceil(view.h * map.rows.length + view.bottom), ratio = devicePixelRatio || 1;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    paint(view);
  }
  function colourOf(view, i) {
    if (view.kind === "bits") return bitColours[bitsOf(i)];
    return isNaN(alpha[i]) ? noColour : heat(alpha[i]);
  }
  let bitColours = {}, noColour = [150, 150, 150];
  function paint(view) {
    const { map, canvas, kind } = view, columns = map.columns.length, rows = map.rows.length;
    const context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const inner = view.image.getContext("2d"), image = inner.createImageData(columns, rows);
    for (let at = 0; at < map.cells.length; at++) {
      const i = map.cells[at];
      if (i < 0) continue;
      const colour = colourOf(view, i);
      image.data.set([colour[0], colour[1], colour[2], 255], 4 * at);
    }
    inner.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(view.image, view.left, 0, view.w * columns, view.h * rows);
    if (view.w >= 7) {  // gaps tell neighbours of one colour apart
      context.strokeStyle = theme.card;
      context.lineWidth = 1;
      context.beginPath();
      for (let c = 0; c <= columns; c++) { context.moveTo(view.left + c * view.w, 0); context.lineTo(view.left + c * view.w, view.h * rows); }
      for (let r = 0; r <= rows; r++) { context.moveTo(view.left, r * view.h); context.lineTo(view.left + view.w * columns, r * view.h); }
      context.stroke();
    }
    const family = getComputedStyle(document.body).fontFamily;
    context.textAlign = "center";
    context.textBaseline = "middle";
    if (view.w >= (kind === "bits" ? cellText : 27)) {
      context.font = `600 ${Math.min(12, view.w * 0.8)}px ${family}`;
      for (let at = 0; at < map.cells.length; at++) {
        const i = map.cells[at];
        if (i < 0) continue;
        context.fillStyle = inkOn(colourOf(view, i));
        const text = kind === "bits" ? String(bitsOf(i)) : isNaN(alpha[i]) ? "–" : alpha[i].toFixed(2);
        context.fillText(text, view.left + ((at % columns) + 0.5) * view.w, (Math.floor(at / columns) + 0.5) * view.h + 0.5);
      }
    }
    context.fillStyle = theme.soft;
    context.font = `11px ${family}`;
    const everyRow = Math.ceil(13 / view.h), everyColumn = map.experts ? nice(34 / view.w) : 1;
    context.textAlign = "right";
    for (let r = 0; r < rows; r += everyRow) context.fillText(map.rows[r], view.left - 6, (r + 0.5) * view.h);
    context.textAlign = "center";
    for (let c = 0; c < columns; c += everyColumn) context.fillText(map.columns[c], view.left + (c + 0.5) * view.w, view.h * rows + 10);
    if (state.selected >= 0 && maps[mapOf[state.selected]] === map) {
      const w = Math.max(view.w, 7), h = Math.max(view.h, 7);
      const x = view.left + (columnOf[state.selected] + 0.5) * view.w - w / 2, y = (rowOf[state.selected] + 0.5) * view.h - h / 2;
      context.lineWidth = 4;
      context.strokeStyle = theme.card;
      context.strokeRect(x, y, w, h);
      context.lineWidth = 2;
      context.strokeStyle = theme.mark;
      context.strokeRect(x, y, w, h);
    }
  }
  const nice = (value) => [1, 2, 4, 8, 16, 32, 64, 128].find((step) => step >= value) || 256;
  function cellAt(view, event) {
    const box = view.canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - view.left) / view.w), r = Math.floor((event.clientY - box.top) / view.h);
    return c < 0 || r < 0 || c >= view.map.columns.length || r >= view.map.rows.length ? -1 : view.map.cells[r * view.map.columns.length + c];
  }
  const every = (work) => maps.forEach((map) => map.views.forEach(work));
  function placeWords(i) {
    const map = maps[mapOf[i]];
    return map.experts ? `layer ${map.rows[rowOf[i]]}, expert ${map.columns[columnOf[i]]}, ${map.title}` : `layer ${map.rows[rowOf[i]]}, ${map.columns[columnOf[i]]}`;
  }
  const words = (i) => `${placeWords(i)}: ${choices[choiceOf(i)].name} (${plural(bitsOf(i))}), α ${isNaN(alpha[i]) ? "undefined" : alpha[i].toFixed(3)}`;
  const tipBox = make(document.body, "div");
  tipBox.id = "tip";
  tipBox.hidden = true;
  function tip(event, text) {
    tipBox.hidden = !text;
    if (!text) return;
    tipBox.textContent = text;
    const width = tipBox.offsetWidth;
    tipBox.style.left = `${Math.max(4, Math.min(innerWidth - width - 4, event.clientX + 14))}px`;
    tipBox.style.top = `${Math.max(4, event.clientY - 34)}px`;
  }
  function legends() {
    const place = byId("alpha-legend");
    place.replaceChildren();
    if (hasAlpha) {
      make(place, "span", "", `α ${alphaLow.toFixed(2)}, heavy tail`);
      const canvas = make(place, "canvas"), context = canvas.getContext("2d");
      canvas.width = 144;
      canvas.height = 1;
      for (let x = 0; x < 144; x++) { context.fillStyle = `rgb(${cividis(1 - x / 143)})`; context.fillRect(x, 0, 1, 1); }
      make(place, "span", "", `${alphaHigh.toFixed(2)}, light tail`);
    } else make(place, "span", "", "α is not known");
    const bits = byId("bits-legend");
    bits.replaceChildren();
    make(bits, "span", "", "bits");
    for (const one of offered) make(bits, "span", `chip b${Math.round(one)}`, String(one)).style.background = theme.bits[one];
  }

  // ---- the panel of one matrix --------------------------------------------------------------------------------
  const densities = data.densities && (() => {
    const raw = data.densities, where = new Map();
    const found = { bins: raw.bins, counts: unpack(raw.counts), low: unpack(raw.low), high: unpack(raw.high), start: unpack(raw.start), alpha: unpack(raw.alpha), tail: unpack(raw.tail), count: unpack(raw.count), where };
    unpack(raw.matrix).forEach((i, at) => where.set(i, at));
    return found;
  })();
  function select(i, byPointer) {
    state.selected = i;
    every(paint);
    panel();
    markScatter();
    if (byPointer && matchMedia("(max-width: 70rem)").matches) byId("panel").scrollIntoView({ block: "nearest" });
  }
  function panel() {
    const place = byId("panel"), i = state.selected;
    place.replaceChildren();
    if (i < 0) {
      make(place, "p", "hint", "Select a matrix in a map to see its α, its choices along the budget and its spectrum.");
      return;
    }
    place.dataset.matrix = nameOf(i);
    make(place, "h3", "", nameOf(i));
    const facts = make(place, "dl", "facts");
    const fact = (name, value, id) => { make(facts, "dt", "", name); const cell = make(facts, "dd", "", value); if (id) cell.id = id; };
    fact("place", placeWords(i));
    fact("this plan", choices[planChoice[i]].name, "panel-plan");
    if (P && !state.own) fact("at the slider", choices[choiceOf(i)].name, "panel-slider");
    fact("α", isNaN(alpha[i]) ? "undefined" : `${alpha[i].toFixed(3)} (rank ${group(rankOf(alpha[i]))} of ${group(known.length)})`, "panel-alpha");
    if (weights) fact("weights", group(weights[i]));
    fact("relative error", isNaN(error[i]) ? "not predicted" : `${figures(error[i])} predicted`);
    if (measured && !isNaN(measured[i])) fact("", `${figures(measured[i])} in the files`);
    make(place, "h4", "", "Density of eigenvalues");
    if (!densities) make(place, "p", "small", "Not here: it needs the weights. Make the report with --reference MODEL.");
    else if (!densities.where.has(i)) make(place, "p", "small", `Not kept for this matrix: ${group(densities.where.size)} of ${group(COUNT)} were sampled. Raise --spectra to keep more.`);
    else density(make(place, "div", "chart"), densities.where.get(i));
    if (P) ladder(place, i);
  }
  function ladder(place, i) {
    const unit = P.unit[i], rows = [[P.start[unit], P.startLoss[unit], -1]];
    for (let k = 0; k < P.steps; k++) if (P.stepUnit[k] === unit) rows.push([P.stepColumn[k], rows[rows.length - 1][1] - P.saved[k], k]);
    const shared = P.members[unit];
    make(place, "h4", "", shared > 1 ? `Its way up, shared by ${group(shared)} matrices` : "Its way up");
    const table = make(place, "table"), head = make(make(table, "thead"), "tr");
    for (const title of ["choice", "loss", sized ? "from file size" : "from"]) make(head, "th", "", title);
    const body = make(table, "tbody"), now = state.own ? P.planColumn[unit] : column[unit];
    rows.forEach(([at, loss, k], number) => {
      const row = make(body, "tr", at === now ? "now" : "");
      make(row, "td", "", choices[P.choice[at]].name);
      make(row, "td", "", figures(Math.max(loss, 0), 3));  // what float32 leaves of a difference may be below 0
      make(row, "td", "", number ? amount(P.cost[k + 1]) : "the start");
    });
    if (!rows.some(([at]) => at === now)) make(place, "p", "small", `${choices[P.choice[now]].name} fills what the budget left over; no price alone would choose it.`);
  }
  function density(place, at) {
    const { bins } = densities, low = densities.low[at], high = densities.high[at], count = densities.count[at];
    const points = [], edge = (k) => 10 ** (low + ((high - low) * k) / bins);
    let least = Infinity, most = 0;
    for (let k = 0; k < bins; k++) {
      const value = densities.counts[at * bins + k] / count / (edge(k + 1) - edge(k));
      if (!value) continue;
      points.push([Math.sqrt(edge(k) * edge(k + 1)), value]);
      least = Math.min(least, value);
      most = Math.max(most, value);
    }
    if (!points.length) { make(place, "p", "small", "The matrix has no eigenvalue above zero."); return; }
    const start = densities.start[at], fit = densities.alpha[at], law = !isNaN(fit) && start > 0;
    const height = law ? (densities.tail[at] / count) * (fit - 1) / start : 0;
    if (law) { least = Math.min(least, height * (edge(bins) / start) ** -fit); most = Math.max(most, height); }
    const chart = frame(place, { low: edge(0), high: edge(bins), log: true, name: "eigenvalue λ" }, { low: least / 1.6, high: most * 1.6, log: true, name: "density" },
      law ? `Density of ${count} eigenvalues; tail of ${densities.tail[at]} from ${figures(start, 3)} with α ${fit.toFixed(3)}` : `Density of ${count} eigenvalues, no tail fitted`, { right: 8 });
    if (law) {
      const x = chart.fx(Math.max(start, edge(0)));
      draw(chart.svg, "rect", { x, y: chart.top, width: Math.max(0, chart.right - x), height: chart.bottom - chart.top, fill: theme.mark, opacity: 0.08 });
    }
    for (const [x, y] of points) draw(chart.svg, "path", { d: shape(0, chart.fx(x), chart.fy(y), 2.4), fill: theme.accent });
    if (law) {
      const ends = [start, edge(bins)].map((value) => [chart.fx(value), chart.fy(height * (value / start) ** -fit)]);
      draw(chart.svg, "path", { d: pathOf(ends), stroke: theme.mark, "stroke-width": 2.5, fill: "none" });
      draw(chart.svg, "text", { class: "strong", x: chart.right - 2, y: chart.top + 12, "text-anchor": "end" }, `tail, α = ${fit.toFixed(2)}`);
    }
  }

  // ---- the slider ---------------------------------------------------------------------------------------------
  const MOST = 2000;
  const costAt = (value) => P.cost[0] + ((P.cost[P.steps] - P.cost[0]) * value) / MOST;
  const positionOf = (cost) => Math.round(((cost - P.cost[0]) / (P.cost[P.steps] - P.cost[0] || 1)) * MOST);
  let waiting = false;
  function go(step, own, keepSlider) {
    state.step = Math.min(P.steps, Math.max(0, step));
    state.own = own;
    if (!keepSlider) byId("slider").value = positionOf(own ? P.planCost : P.cost[state.step]);
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; show(); });
  }
  function put(id, text, value) {
    const element = byId(id);
    element.textContent = text;
    element.dataset.value = value;
  }
  function show() {
    walk(state.step);
    const cost = state.own ? P.planCost : P.cost[state.step], loss = state.own ? P.planLoss : P.loss[state.step];
    put("at-size", amount(cost), sizeAt(cost));
    put("at-loss", figures(loss, 5), loss);
    const ratio = loss / P.planLoss;
    put("at-ratio", state.own ? "itself" : P.planLoss > 0 ? (ratio < 10 ? `${ratio < 1 ? "−" : "+"}${figures(Math.abs(100 * (ratio - 1)), 3)} %` : `${figures(ratio, 3)} ×`) : "–", ratio);
    const price = state.step < P.steps ? P.saved[state.step] / (P.cost[state.step + 1] - P.cost[state.step]) : 0;
    put("at-price", figures(price * (bytes ? 1024 : 1), 3), price);
    let total = 0, sum = 0;
    const counts = {}, plan = {};
    for (let i = 0; i < COUNT; i++) {
      const bits = bitsOf(i), weight = weights ? weights[i] : 1;
      counts[bits] = (counts[bits] || 0) + 1;
      plan[bitsOfChoice[planChoice[i]]] = (plan[bitsOfChoice[planChoice[i]]] || 0) + 1;
      sum += bits * weight;
      total += weight;
    }
    if (weights && bytes) put("at-bits", figures((8 * cost) / total, 4), (8 * cost) / total);
    else put("at-bits", (sum / total).toFixed(3), sum / total);
    const text = state.own ? "This plan, as solved." : state.step === P.planStep ? "Best path at this plan's budget." : state.step === P.steps ? "Every matrix at its best choice: more bytes save nothing." : state.step === 0 ? "Every matrix at its cheapest choice." : `${group(state.step)} of ${group(P.steps)} steps up from the cheapest plan.`;
    byId("state").textContent = text;
    byId("state").dataset.step = state.step;
    byId("slider").setAttribute("aria-valuetext", `${amount(cost)}, predicted loss ${figures(loss, 4)}`);
    bars(counts, plan);
    curve();
    maps.forEach((map) => map.views.filter((view) => view.kind === "bits").forEach(paint));
    scatterLater();
    if (state.selected >= 0) panel();
  }
  function bars(counts, plan) {
    const place = byId("bars"), most = Math.max(...Object.values(counts), ...Object.values(plan));
    place.replaceChildren();
    for (const bits of offered) {
      const line = make(place, "div", "barline");
      make(line, "span", "", plural(bits));
      const track = make(line, "i"), fill = make(track, "b"), outline = make(track, "u");
      fill.style.background = theme.bits[bits];
      fill.style.width = `${(100 * (counts[bits] || 0)) / most}%`;
      outline.style.width = `${(100 * (plan[bits] || 0)) / most}%`;
      outline.hidden = !plan[bits];
      fill.hidden = !counts[bits];
      make(line, "span", "", group(counts[bits] || 0)).dataset.bits = bits;
    }
  }
  let curvePoints = null;
  function curve() {
    const place = byId("curve");
    if (!curvePoints) {
      curvePoints = [];
      let last = -1;
      for (let k = 0; k <= 600; k++) {
        const step = stepsWithin(P.cost[0] + ((P.cost[P.steps] - P.cost[0]) * k) / 600);
        if (step !== last && P.loss[step] > 0) curvePoints.push([P.cost[step], P.loss[step]]);
        last = step;
      }
    }
    if (!curvePoints.length) { place.textContent = "No loss is above zero, so there is no curve."; return; }
    const lossLow = Math.min(curvePoints[curvePoints.length - 1][1], P.planLoss || Infinity), scale = bytes ? unitFor(sizeAt(P.cost[P.steps])) : [1, P.unitOfCost];
    const chart = frame(place, { low: sizeAt(P.cost[0]) / scale[0], high: sizeAt(P.cost[P.steps]) / scale[0], name: bytes ? `${sized ? "weight files" : "planned matrices"}, ${scale[1]}` : scale[1] },
      { low: lossLow / 1.3, high: Math.max(curvePoints[0][1], P.planLoss) * 1.3, log: true, name: "predicted loss" }, "Predicted loss for every size; the slider moves along it");
    const at = ([cost, loss]) => [chart.fx(sizeAt(cost) / scale[0]), chart.fy(loss)];
    draw(chart.svg, "path", { d: pathOf(curvePoints.map(at)), fill: "none", stroke: theme.accent, "stroke-width": 2.5 });
    const low = sizeAt(P.cost[0]), high = sizeAt(P.cost[P.steps]);
    let row = 0, before = -Infinity;
    for (const machine of sized ? data.machines : []) {
      if (machine.weights_bytes < low || machine.weights_bytes > high) continue;
      const x = chart.fx(machine.weights_bytes / scale[0]);
      row = x - before < 46 ? 1 - row : 0;  // so that no label covers its neighbour
      before = x;
      draw(chart.svg, "line", { class: "axis", x1: x, x2: x, y1: chart.top, y2: chart.bottom, "stroke-dasharray": "2 4" });
      draw(chart.svg, "text", { class: "machine", x: x + 4, y: chart.top + 10 + 14 * row }, `${machine.gib} GB`);
    }
    const [px, py] = at([P.planCost, P.planLoss]);
    draw(chart.svg, "path", { d: shape(3, px, py, 6), fill: theme.ink, stroke: theme.card, "stroke-width": 1.5 });
    draw(chart.svg, "text", { class: "strong", x: px + 11, y: py - 7 }, "this plan");
    if (!state.own && P.loss[state.step] > 0) {
      const [x, y] = at([P.cost[state.step], P.loss[state.step]]);
      draw(chart.svg, "line", { x1: x, x2: x, y1: y, y2: chart.bottom, stroke: theme.mark, "stroke-dasharray": "3 3" });
      draw(chart.svg, "circle", { cx: x, cy: y, r: 6.5, fill: theme.mark, stroke: theme.card, "stroke-width": 2 });
    }
    place.onclick = (event) => {
      const share = (event.clientX - place.getBoundingClientRect().left - chart.left) / (chart.right - chart.left);
      go(stepsWithin(costAt(Math.min(1, Math.max(0, share)) * MOST)), false);
    };
  }
  function unitFor(size) {
    return [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "bytes"]].find(([unit]) => size >= unit || unit === 1);
  }
  function wireSlider() {
    if (!P) return;
    byId("size-name").textContent = sized ? "weight files" : bytes ? "planned matrices" : "budget";
    byId("bits-name").textContent = weights && bytes ? "stored bits per weight" : weights ? "bits per weight" : "bits, mean over matrices";
    if (!bytes) byId("at-price").previousElementSibling.textContent = "one more bit saves";
    const slider = byId("slider");
    slider.max = MOST;
    slider.addEventListener("input", () => go(+slider.value >= MOST ? P.steps : stepsWithin(costAt(+slider.value)), false, true));
    byId("less").addEventListener("click", () => go(state.own ? P.planStep : state.step - 1, false));
    byId("more").addEventListener("click", () => go(state.own ? P.planStep : state.step + 1, false));
    byId("reset").addEventListener("click", () => go(P.planStep, true));
    slider.value = positionOf(P.planCost);
  }

  // ---- α against distortion -----------------------------------------------------------------------------------
  const kinds = [];
  if (error.some((value) => value > 0)) kinds.push(["relative error at this plan, predicted", (i) => error[i]]);
  if (measured) kinds.push(["relative error in the files, measured", (i) => measured[i]]);
  if (P && P.start.length === COUNT) kinds.push(["loss at the cheapest choice", (i) => P.startLoss[P.unit[i]]]);
  let scatterPoints = [], scatterChart = null, scatterTimer = 0;
  function scatterLater() {
    clearTimeout(scatterTimer);
    scatterTimer = setTimeout(scatter, 120);
  }
  function scatter() {
    const place = byId("scatter"), select_ = byId("scatter-kind");
    if (!hasAlpha || !kinds.length) {
      place.textContent = hasAlpha ? "The plan holds no errors or losses to draw." : "α is not known. Give --stats of `alphaq analyze`.";
      return;
    }
    if (!select_.options.length) kinds.forEach(([name], k) => { const option = make(select_, "option", "", name); option.value = k; });
    const value = kinds[+select_.value][1];
    scatterPoints = [];
    let low = Infinity, high = 0;
    for (let i = 0; i < COUNT; i++) {
      const y = value(i);
      if (isNaN(alpha[i]) || !(y > 0)) continue;
      scatterPoints.push(i);
      if (y < low) low = y;
      if (y > high) high = y;
    }
    if (!scatterPoints.length) { place.textContent = "Nothing above zero to draw."; return; }
    const edge = (known[known.length - 1] - known[0]) * 0.03 || 0.1;
    const chart = frame(place, { low: known[0] - edge, high: known[known.length - 1] + edge, name: "tail exponent α" }, { low: low / 1.2, high: high * 1.2, log: true, name: kinds[+select_.value][0] },
      `${scatterPoints.length} matrices by α and ${kinds[+select_.value][0]}`, { canvas: true });
    const context = chart.canvas.getContext("2d"), many = scatterPoints.length > 4000, radius = many ? 1.4 : scatterPoints.length > 800 ? 2.6 : 4;
    context.globalAlpha = many ? 0.55 : 0.85;
    context.lineWidth = 0.6;
    context.strokeStyle = isDark() ? "#fff9" : "#0007";
    const used = new Set();
    for (const i of scatterPoints) {
      const bits = bitsOf(i), x = chart.fx(alpha[i]), y = chart.fy(value(i));
      used.add(bits);
      context.fillStyle = theme.bits[bits];
      if (many) { context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius); continue; }
      const mark = new Path2D(shape(offered.indexOf(bits), x, y, radius));
      context.fill(mark);
      context.stroke(mark);
    }
    scatterChart = { chart, value };
    const legend = byId("scatter-legend");
    legend.replaceChildren();
    for (const bits of [...used].sort((a, b) => a - b)) {
      const key = make(legend, "span"), svg = draw(key, "svg", { width: 14, height: 14, "aria-hidden": "true" });
      draw(svg, "path", { d: shape(many ? 1 : offered.indexOf(bits), 7, 7, 5), fill: theme.bits[bits], stroke: theme.soft, "stroke-width": 0.7 });
      key.append(plural(bits));
    }
    place.onclick = (event) => {
      const box = place.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      let best = -1, distance = 15 * 15;
      for (const i of scatterPoints) {
        const far = (chart.fx(alpha[i]) - x) ** 2 + (chart.fy(value(i)) - y) ** 2;
        if (far < distance) { distance = far; best = i; }
      }
      if (best >= 0) select(best);
    };
    markScatter();
  }
  function markScatter() {
    if (!scatterChart) return;
    const { chart, value } = scatterChart, i = state.selected;
    chart.svg.querySelectorAll(".picked").forEach((one) => one.remove());
    if (i < 0 || isNaN(alpha[i]) || !(value(i) > 0)) return;
    const x = chart.fx(alpha[i]), y = chart.fy(value(i));
    draw(chart.svg, "circle", { class: "picked", cx: x, cy: y, r: 8, fill: "none", stroke: theme.mark, "stroke-width": 2.5 });
    draw(chart.svg, "text", { class: "picked strong", x: x + (x > chart.right - 160 ? -12 : 12), y: y - 8, "text-anchor": x > chart.right - 160 ? "end" : "start" }, placeWords(i));
  }

  // ---- other methods ------------------------------------------------------------------------------------------
  const hidden = new Set();
  function methods() {
    const rows = data.compared, place = byId("methods");
    if (!rows.length) return;
    const metric = byId("metric");
    if (!metric.options.length) {
      const texts = Object.keys((rows.find((row) => row.perplexity) || { perplexity: {} }).perplexity);
      const offer = (name, read) => { if (rows.some((row) => read(row) !== null && read(row) !== undefined && row.method !== "reference")) { make(metric, "option", "", name).read = read; } };
      offer("KL divergence, nats per token", (row) => row.kl);
      offer("perplexity, mean of texts", (row) => row.mean_perplexity);
      for (const text of texts) offer(`perplexity, ${text}`, (row) => (row.perplexity || {})[text]);
      metric.addEventListener("change", methods);
      const names = [...new Set(rows.filter((row) => row.method !== "reference" && row.bits < 16).map((row) => row.label))];
      const own = names.findIndex((name) => name.split(" (")[0] === data.plan.method);
      names.forEach((name, k) => { if (k >= 8 && k !== own) hidden.add(name); });
    }
    if (!metric.options.length) { place.textContent = "The comparison holds no measured figures."; return; }
    const read = metric.selectedOptions[0].read, series = new Map();
    let reference = null;
    for (const row of rows) {
      const value = read(row);
      if (value === null || value === undefined || row.size_bytes === null) continue;
      if (row.method === "reference" || row.bits >= 16) { reference = value; continue; }
      if (!series.has(row.label)) series.set(row.label, []);
      series.get(row.label).push([row.size_bytes, value]);
    }
    const names = [...series.keys()], shown = names.filter((name) => !hidden.has(name)), every_ = shown.flatMap((name) => series.get(name));
    const legend = byId("methods-legend");
    legend.replaceChildren();
    const style = (name) => { const k = names.indexOf(name); return { colour: theme.methods[k % theme.methods.length], dash: ["", "7 4", "2 3", "9 3 2 3"][Math.floor(k / 2) % 4], mark: k }; };
    const own = (name) => name.split(" (")[0] === data.plan.method;
    for (const name of names) {
      const key = make(legend, "button"), look = style(name), svg = draw(key, "svg", { width: 34, height: 14, "aria-hidden": "true" });
      key.type = "button";
      key.setAttribute("aria-pressed", String(!hidden.has(name)));
      draw(svg, "line", { x1: 0, x2: 34, y1: 7, y2: 7, stroke: look.colour, "stroke-width": own(name) ? 3 : 2, "stroke-dasharray": look.dash });
      draw(svg, "path", { d: shape(look.mark, 17, 7, 4.5), fill: look.colour });
      key.append(own(name) ? `${name}, this plan's` : name);
      key.addEventListener("click", () => { if (hidden.has(name)) hidden.delete(name); else hidden.add(name); methods(); });
    }
    if (!every_.length) { place.textContent = "All methods are switched off."; return; }
    const xs = every_.map((one) => one[0]), ys = every_.map((one) => one[1]).filter((value) => value > 0);
    const scale = unitFor(Math.max(...xs)), span = Math.max(...xs) - Math.min(...xs) || Math.max(...xs) * 0.1;
    const low = Math.min(...ys, ...(reference > 0 ? [reference] : [])), high = Math.max(...ys);
    const chart = frame(place, { low: (Math.min(...xs) - span * 0.04) / scale[0], high: (Math.max(...xs) + span * 0.04) / scale[0], name: `weight files, ${scale[1]}` }, { low: low / 1.08, high: high * 1.08, log: high / low > 3, name: metric.value }, `${metric.value} by size for ${shown.length} methods`, { right: innerWidth < 600 ? 16 : 130 });
    if (reference > 0) {
      const y = chart.fy(reference);
      draw(chart.svg, "line", { x1: chart.left, x2: chart.right, y1: y, y2: y, stroke: theme.soft, "stroke-dasharray": "6 5" });
      draw(chart.svg, "text", { x: chart.left + 6, y: y - 6 }, "unquantized");
    }
    const labels = [];
    for (const name of shown) {
      const look = style(name), points = series.get(name).sort((a, b) => a[0] - b[0]).filter((one) => one[1] > 0).map(([x, y]) => [chart.fx(x / scale[0]), chart.fy(y)]);
      if (!points.length) continue;
      draw(chart.svg, "path", { d: pathOf(points), fill: "none", stroke: look.colour, "stroke-width": own(name) ? 3.5 : 1.8, "stroke-dasharray": look.dash });
      for (const [x, y] of points) draw(chart.svg, "path", { d: shape(look.mark, x, y, own(name) ? 6 : 4.5), fill: look.colour, stroke: theme.card, "stroke-width": 1 });
      labels.push({ name, colour: look.colour, x: points[points.length - 1][0], y: points[points.length - 1][1] });
    }
    if (innerWidth < 600) return;
    labels.sort((a, b) => a.y - b.y);
    labels.forEach((label, k) => { if (k) label.y = Math.max(label.y, labels[k - 1].y + 14); });
    for (let k = labels.length - 1, floor = chart.bottom + 4; k >= 0; k--) { labels[k].y = Math.min(labels[k].y, floor); floor = labels[k].y - 14; }
    for (const label of labels) draw(chart.svg, "text", { class: own(label.name) ? "strong" : "", x: chart.right + 6, y: label.y + 4, style: `fill:${label.colour}` }, label.name);
  }

  // ---- all together -------------------------------------------------------------------------------------------
  function restyle() {
    readTheme();
    noColour = rgb(theme.none);
    for (const bits in theme.bits) bitColours[bits] = rgb(theme.bits[bits]);
    legends();
    every(layout);
    if (P) show();
    clearTimeout(scatterTimer);
    scatter();
    panel();
    methods();
  }
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    restyle();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", async () => {
    const code = button.parentNode.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {  // a file opened from disk may not be allowed to
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }));
  byId("scatter-kind").addEventListener("change", scatter);
  let lastWidth = innerWidth, resizing = 0;
  addEventListener("resize", () => {  // a phone's address bar changes the height alone
    if (innerWidth === lastWidth) return;
    lastWidth = innerWidth;
    clearTimeout(resizing);
    resizing = setTimeout(restyle, 80);
  });
  buildMaps();
  wireSlider();
  restyle();
  document.documentElement.dataset.ready = "yes";
})();
