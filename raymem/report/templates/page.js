"use strict";
// The page is whole without this script; it adds readings under the pointer and the keyboard.
(() => {
  const tip = document.getElementById("tip");

  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const right = document.documentElement.clientWidth - box.width - 8;
    const left = Math.max(8, Math.min(x + 14, right));
    const above = y - box.height - 12;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(above < 4 ? y + 18 : above) + window.scrollY}px`;
  }

  function hide() {
    tip.hidden = true;
  }

  function nearest(points, place) {
    let low = 0;
    let high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][2] < place) low = middle;
      else high = middle;
    }
    return place - points[low][2] <= points[high][2] - place ? points[low] : points[high];
  }

  function chart(svg) {
    const series = [...svg.querySelectorAll(".series")].map((group) => ({
      name: group.dataset.name,
      points: JSON.parse(group.dataset.points),
    }));
    const places = [...new Set(series.flatMap((one) => one.points.map((point) => point[2])))].sort((a, b) => a - b);
    if (!places.length) return;
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", svg.dataset.top);
    cursor.setAttribute("y2", svg.dataset.bottom);
    let at = -1;

    function read(place, clientY) {
      const found = series.map((one) => [one.name, nearest(one.points, place)]);
      const closest = Math.min(...found.map(([, point]) => Math.abs(point[2] - place)));
      const step = found.find(([, point]) => Math.abs(point[2] - place) === closest)[1];
      cursor.setAttribute("x1", step[2]);
      cursor.setAttribute("x2", step[2]);
      svg.append(cursor);
      const lines = found.map(([name, point]) => {
        const where = point[0] === step[0] ? "" : ` (step ${point[0]})`;
        return `${name}: ${point[1]}${where}`;
      });
      const box = svg.getBoundingClientRect();
      const scale = box.width / svg.viewBox.baseVal.width;
      show(`step ${step[0]}\n${lines.join("\n")}`, box.left + step[2] * scale, clientY ?? box.top + box.height / 3);
    }

    function leave() {
      cursor.remove();
      hide();
    }

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      read(((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width, event.clientY);
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const last = places.length - 1;
      const next = { ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") leave();
      if (next === undefined) return;
      event.preventDefault();
      at = Math.max(0, Math.min(last, next));
      read(places[at]);
    });
  }

  function dot(link) {
    const row = document.getElementById(link.dataset.row);
    link.querySelector("title").remove(); // the browser's own tip would cover ours
    const enter = () => {
      const box = link.querySelector(".mark").getBoundingClientRect();
      show(link.dataset.tip, box.left + box.width / 2, box.top);
      row?.classList.add("lit");
    };
    const leave = () => {
      hide();
      row?.classList.remove("lit");
    };
    link.addEventListener("pointerenter", enter);
    link.addEventListener("focus", enter);
    link.addEventListener("pointerleave", leave);
    link.addEventListener("blur", leave);
  }

  document.querySelectorAll("svg.chart").forEach(chart);
  document.querySelectorAll("a.dot").forEach(dot);
  document.documentElement.dataset.ready = "yes";
})();
