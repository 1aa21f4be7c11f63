// The live part of the latent browser: a list to search and sort, and a scatter, over pages that Python has drawn.
// It finds elements of class latent-browser: static pages, then an index and packs of pages as base64 of gzip.
(() => {
  "use strict";
  const INK = "color:#1a1a1a;background:#ffffff";
  const FIELD = `${INK};border:1px solid #767676;border-radius:4px;padding:4px;font:14px Arial,Helvetica,sans-serif`;
  const MONO = "font:13px Menlo,Consolas,'DejaVu Sans Mono',monospace";
  const MARGIN = { left: 62, right: 14, top: 12, bottom: 44 }; // pixels around the scatter's axes
  const REACH = 12; // pixels between a click and the point that it means

  for (const root of document.querySelectorAll(".latent-browser:not([data-live])")) {
    root.dataset.live = ""; // a second script on the page leaves it alone
    browse(root).catch((error) => {
      root.firstChild.prepend(element("p", { role: "alert", textContent: `The browser could not start (${error}).` }));
    });
  }

  async function browse(root) {
    const { latents, scatter, per_pack } = await unpack(root, 0);
    for (const [i, latent] of latents.entries()) {
      Object.assign(latent, { i, text: `${latent.numbers.latent} ${latent.words}`.toLowerCase() });
    }
    const state = { latents, scatter, shown: latents, chosen: latents[0] };
    const parts = layout(root, state);
    const unpacked = new Map(); // number of a pack -> its pages, or the promise of them

    const list = () => {
      state.shown = sorted(found(latents, parts.search.value), parts.sort.value, parts.order.value);
      parts.list.replaceChildren(...state.shown.map((latent) => option(latent, parts.sort.value)));
      parts.list.value = state.shown.includes(state.chosen) ? state.chosen.i : "";
      parts.count.textContent = state.shown.length
        ? `${state.shown.length.toLocaleString("en")} of ${latents.length.toLocaleString("en")} latents`
        : `No latent matches “${parts.search.value}”: try a number, or a token on which it is active.`;
      parts.draw();
    };
    const choose = async (latent) => {
      state.chosen = latent;
      parts.list.value = latent.i;
      parts.draw();
      const number = Math.floor(latent.i / per_pack);
      if (!unpacked.has(number)) unpacked.set(number, unpack(root, 1 + number));
      const pages = await unpacked.get(number);
      if (state.chosen === latent) parts.show(pages[latent.i % per_pack]); // another may have been chosen meanwhile
    };
    parts.search.addEventListener("input", list);
    parts.sort.addEventListener("change", list);
    parts.order.addEventListener("change", list);
    parts.list.addEventListener("change", () => choose(latents[parts.list.value]));
    parts.page.addEventListener("click", (event) => {
      const number = event.target.dataset.latent;
      const latent = number && latents.find((other) => String(other.numbers.latent) === number);
      if (latent) choose(latent).then(() => parts.page.focus());
    });
    parts.canvas?.addEventListener("click", (event) => {
      const latent = parts.nearest(event.offsetX, event.offsetY);
      if (latent) choose(latent);
    });
    list();
    await choose(latents[0]);
    root.firstChild.replaceWith(parts.all);
    parts.draw();
    performance.mark("latents-shown"); // how long a reader waits: performance.getEntriesByName("latents-shown")
  }

  // The index, 0, and the first pages, 1, stand before this script; the others may still be on their way.
  async function unpack(root, number) {
    if (number > 1 && document.readyState === "loading") {
      await new Promise((loaded) => document.addEventListener("DOMContentLoaded", loaded));
    }
    const packed = root.querySelectorAll('script[type="text/plain"]')[number].textContent;
    const bytes = Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function found(latents, query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    return latents.filter((latent) => words.every((word) => latent.text.includes(word)));
  }

  // What has no value comes last in either order.
  function sorted(latents, name, order) {
    const sign = order === "up" ? 1 : -1;
    const absent = (latent) => latent.numbers[name] === null || latent.numbers[name] === undefined;
    const compare = (a, b) => (a < b ? -sign : a > b ? sign : 0);
    return [...latents].sort((a, b) => absent(a) - absent(b) || compare(a.numbers[name], b.numbers[name]));
  }

  function option(latent, name) {
    const value = name === "latent" ? latent.numbers.density : latent.numbers[name];
    const text = typeof value === "number" ? value.toPrecision(3) : (value ?? "–");
    return element("option", { value: latent.i, textContent: `${latent.numbers.latent} · ${text} · ${latent.at}` });
  }

  // ---- what is seen

  function layout(root, state) {
    const names = [...new Set(state.latents.flatMap((latent) => Object.keys(latent.numbers)))];
    const search = element("input", { type: "search", placeholder: "number or tokens", style: FIELD });
    const options = names.map((name) => element("option", { value: name, textContent: name }));
    const sort = element("select", { style: FIELD }, options);
    const order = element("select", { style: FIELD }, [
      element("option", { value: "up", textContent: "smallest first" }),
      element("option", { value: "down", textContent: "largest first" }),
    ]);
    const list = element("select", { size: 22, style: `${FIELD};${MONO}` });
    const count = element("p", { role: "status", style: `${INK};margin:0` });
    const fields = { Search: search, "Sort by": sort, Order: order, Latents: list };
    const labelled = Object.entries(fields).map(([name, field]) => label(name, field));
    const column = `${INK};display:flex;flex-direction:column;gap:6px;flex:0 0 250px`;
    const left = element("div", { style: column }, [...labelled, count]);
    const page = element("div", { tabIndex: 0, role: "region", style: INK });
    page.ariaLabel = "Page of the latent; left and right go through its tokens";
    const readout = element("p", { role: "status", style: `${INK};margin:0 0 6px;min-height:20px;font-size:13px` });
    const plot = state.scatter.length ? scatterOf(state) : { draw: () => {} };
    const parts = [plot.canvas, readout, page].filter(Boolean);
    const right = element("div", { style: `${INK};flex:1 1 420px;min-width:0` }, parts);
    const rows = "display:flex;flex-wrap:wrap;gap:16px;padding:8px"; // where there is little room, page below list
    const frame = `${INK};color-scheme:light;font:14px Arial,Helvetica,sans-serif;${rows}`;
    const all = element("div", { style: frame }, [left, right]);
    readTokens(page, readout);
    const known = new Set(state.latents.map((latent) => String(latent.numbers.latent)));
    const show = (html) => {
      page.innerHTML = html;
      readout.textContent = "Point at a token, or go through them with the arrow keys, to read its activation.";
      for (const link of page.querySelectorAll("[data-latent]")) {
        if (known.has(link.dataset.latent)) link.replaceWith(linked(link));
      }
    };
    return { all, search, sort, order, list, count, page, show, ...plot };
  }

  // The value of the token under the pointer, or under a cursor that the arrow keys move.
  function readTokens(page, readout) {
    let cursor = -1;
    const seen = (token) => token.checkVisibility(); // not in a folded part
    const tokens = () => [...page.querySelectorAll("mark[title],span[title]")].filter(seen);
    const read = (token) => (readout.textContent = `“${token.textContent}”: ${token.title}`);
    page.addEventListener("mouseover", (event) => {
      const token = event.target.closest("[title]");
      if (token) read(token);
    });
    page.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const all = tokens();
      if (!step || !all.length) return;
      all.forEach((token) => (token.style.outline = ""));
      cursor = Math.min(Math.max(cursor + step, 0), all.length - 1);
      all[cursor].style.outline = "2px solid #0050a0";
      all[cursor].scrollIntoView({ block: "nearest" });
      read(all[cursor]);
      event.preventDefault();
    });
    page.addEventListener("focus", () => (cursor = -1));
  }

  function linked(link) {
    const style = `${INK};border:0;padding:0;font:inherit;color:#0050a0;text-decoration:underline;cursor:pointer`;
    const button = element("button", { type: "button", textContent: link.textContent, style });
    button.dataset.latent = link.dataset.latent;
    return button;
  }

  // ---- the scatter

  function scatterOf(state) {
    const [x, y] = state.scatter;
    const drawn = state.latents.filter((latent) => [x, y].every((name) => typeof latent.numbers[name] === "number"));
    const missing = state.latents.length - drawn.length;
    const note = missing ? `; ${missing} without a value are not drawn` : "";
    const canvas = element("canvas", { role: "img", style: "width:100%;height:300px;cursor:crosshair" });
    canvas.ariaLabel = `Scatter of ${y} over ${x}, ${drawn.length} latents${note}. Choose one here or in the list.`;
    const range = (name) => {
      const values = drawn.map((latent) => latent.numbers[name]);
      const low = values.reduce((a, b) => Math.min(a, b), Infinity);
      const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
      const room = (high - low || 1) * 0.03;
      return [low - room, high + room];
    };
    const [left, right] = range(x);
    const [bottom, top] = range(y);
    const wide = () => canvas.clientWidth - MARGIN.left - MARGIN.right;
    const high = () => canvas.clientHeight - MARGIN.top - MARGIN.bottom;
    const across = (value) => MARGIN.left + ((value - left) / (right - left)) * wide();
    const up = (value) => MARGIN.top + ((top - value) / (top - bottom)) * high();
    const place = (latent) => [across(latent.numbers[x]), up(latent.numbers[y])];

    function draw() {
      if (!canvas.clientWidth) return;
      const [width, height, scale] = [canvas.clientWidth, canvas.clientHeight, window.devicePixelRatio || 1];
      canvas.width = width * scale;
      canvas.height = height * scale;
      const pen = canvas.getContext("2d");
      pen.scale(scale, scale);
      pen.fillStyle = "#ffffff";
      pen.fillRect(0, 0, width, height);
      axes(pen, width, height);
      const shown = new Set(state.shown);
      const size = drawn.length > 1000 ? 3 : 6;
      for (const [among, color] of [[false, "#d0d0d0"], [true, "#0072B2"]]) {
        pen.fillStyle = color;
        for (const latent of drawn) {
          if (shown.has(latent) === among) pen.fillRect(...place(latent).map((at) => at - size / 2), size, size);
        }
      }
      if (drawn.includes(state.chosen)) ring(pen, ...place(state.chosen));
    }

    function axes(pen, width, height) {
      pen.font = "13px Arial,Helvetica,sans-serif";
      pen.textAlign = "center";
      for (const value of ticks(left, right)) {
        pen.fillStyle = "#e3e3e3";
        pen.fillRect(across(value), MARGIN.top, 1, high());
        pen.fillStyle = "#1a1a1a";
        pen.fillText(String(value), across(value), height - MARGIN.bottom + 16);
      }
      pen.fillText(x, (MARGIN.left + width - MARGIN.right) / 2, height - 8);
      pen.textAlign = "right";
      for (const value of ticks(bottom, top)) {
        pen.fillStyle = "#e3e3e3";
        pen.fillRect(MARGIN.left, up(value), wide(), 1);
        pen.fillStyle = "#1a1a1a";
        pen.fillText(String(value), MARGIN.left - 6, up(value) + 4);
      }
      pen.textAlign = "center";
      pen.save();
      pen.translate(14, (MARGIN.top + height - MARGIN.bottom) / 2);
      pen.rotate(-Math.PI / 2);
      pen.fillText(y, 0, 0);
      pen.restore();
    }

    function ring(pen, at, height) {
      for (const [color, width] of [["#1a1a1a", 5], ["#E69F00", 2.5]]) {
        pen.strokeStyle = color;
        pen.lineWidth = width;
        pen.beginPath();
        pen.arc(at, height, 7, 0, 2 * Math.PI);
        pen.stroke();
      }
    }

    function nearest(at, height) {
      const far = (latent) => Math.hypot(place(latent)[0] - at, place(latent)[1] - height);
      const shown = new Set(state.shown);
      let best = null;
      for (const latent of drawn) if (shown.has(latent) && far(latent) < (best ? far(best) : REACH)) best = latent;
      return best;
    }

    new ResizeObserver(draw).observe(canvas);
    return { canvas, draw, nearest, place };
  }

  // Round values within a range, four to nine of them.
  function ticks(low, high) {
    const power = 10 ** Math.floor(Math.log10((high - low) / 4));
    const step = power * ([5, 2].find((factor) => (high - low) / (power * factor) >= 4) || 1);
    const first = Math.ceil(low / step);
    const length = Math.floor(high / step) - first + 1;
    return Array.from({ length }, (_, i) => Number(((first + i) * step).toPrecision(12)));
  }

  // ---- the document

  function label(text, field) {
    return element("label", { style: `${INK};display:flex;flex-direction:column;gap:2px`, textContent: text }, [field]);
  }

  function element(kind, { style, role, ...properties }, children = []) {
    const node = Object.assign(document.createElement(kind), properties);
    if (style) node.style.cssText = style;
    if (role) node.setAttribute("role", role);
    node.dataset.lmSuppressShortcuts = ""; // JupyterLab's keys are not meant, and it asks the focused element itself
    node.append(...children);
    return node;
  }
})();
