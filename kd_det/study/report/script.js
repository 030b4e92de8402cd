'use strict';

const SVG = 'http://www.w3.org/2000/svg';

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Overlap of two boxes, (x1, y1, x2, y2, …). */
function iou(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]), height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  const area = box => (box[2] - box[0]) * (box[3] - box[1]);
  return width * height / (area(a) + area(b) - width * height);
}

/** Marks boxes that fit no ground truth of their class that a surer box has not taken. */
function mark(boxes, truth) {
  const taken = new Set();
  return [...boxes].sort((a, b) => b[5] - a[5]).map(box => {
    let best = -1, overlap = 0.5;
    truth.forEach((each, index) => {
      const value = each[4] === box[4] && !taken.has(index) ? iou(box, each) : 0;
      if (value >= overlap) [best, overlap] = [index, value];
    });
    if (best >= 0) taken.add(best);
    return { box, wrong: best < 0 };
  });
}

function start(study) {
  const data = JSON.parse(study.querySelector('.data').textContent);
  const find = selector => study.querySelector(selector), all = selector => study.querySelectorAll(selector);
  const method = find('.method'), slider = find('input[type=range]');
  let shown = 0;
  data.images.forEach((image, index) => { image.source = find(`[data-image="${index}"] img`).src; });

  /** The detectors side by side: title -> key of its boxes and maps. */
  function detectors() {
    const named = { teacher: 'teacher', 'plain student': data.plain, [method.value]: method.value };
    const seen = new Set();
    return Object.entries(named).filter(([, key]) => key in data.maps && !seen.has(key) && seen.add(key));
  }

  function drawBoxes(svg, marked, threshold) {
    svg.replaceChildren(...marked.filter(({ box }) => box.length < 6 || box[5] >= threshold).map(({ box, wrong }) => {
      const rect = document.createElementNS(SVG, 'rect'), title = document.createElementNS(SVG, 'title');
      const [x1, y1, x2, y2, label, score] = box;
      const settings = { x: x1, y: y1, width: x2 - x1, height: y2 - y1, stroke: `rgb(${data.palette[label]})` };
      for (const [name, value] of Object.entries(settings)) rect.setAttribute(name, value);
      rect.classList.toggle('wrong', wrong);
      title.textContent = data.classes[label] + (score === undefined ? '' : ` ${score.toFixed(2)}`);
      rect.append(title);
      return rect;
    }));
    return svg.childElementCount;
  }

  function panel(title, image, marked) {
    const svg = document.createElementNS(SVG, 'svg'), count = element('small');
    svg.setAttribute('viewBox', `0 0 ${image.width} ${image.height}`);
    svg.setAttribute('preserveAspectRatio', 'none');
    const picture = element('img', { src: image.source, decoding: 'async', alt: `${image.name}: ${title}`, width: image.width, height: image.height });
    const figure = element('figure', {}, element('figcaption', {}, `${title} `, count), element('div', { class: 'frame' }, picture, svg));
    figure.update = threshold => {
      const drawn = drawBoxes(svg, marked, threshold);
      count.textContent = `${drawn} box${drawn === 1 ? '' : 'es'}`;
    };
    return figure;
  }

  function showImage() {
    const image = data.images[shown];
    const panels = [panel('ground truth', image, image.truth.map(box => ({ box, wrong: false })))];
    for (const [title, key] of detectors()) panels.push(panel(title, image, mark(image.boxes[key], image.truth)));
    find('.panels').replaceChildren(...panels);
    all('[data-image]').forEach(button => button.setAttribute('aria-pressed', String(Number(button.dataset.image) === shown)));
    filter();
    showMaps(image);
  }

  function filter() {
    find('.threshold output').textContent = Number(slider.value).toFixed(2);
    find('.panels').childNodes.forEach(each => each.update(Number(slider.value)));
  }

  function mapRow(title, levels, image) {
    const cells = levels.map(level => {
      const finite = level.low !== null && level.high !== null;
      const inside = finite ? element('img', { src: level.source, alt: `${title}, stride ${level.stride}` })
        : element('p', {}, 'not finite');
      const frame = element('div', { class: 'cells', style: `aspect-ratio: ${image.width} / ${image.height}` }, inside);
      const values = finite ? `: ${level.low} to ${level.high}` : '';
      const without = finite && level.not_finite ? `; ${level.not_finite} cells are not finite` : '';
      return element('figure', {}, frame, element('figcaption', {}, `stride ${level.stride}${values}${without}`));
    });
    return element('div', { class: 'map-row' }, element('h3', {}, title), element('div', { class: 'levels' }, ...cells));
  }

  function showMaps(image) {
    const rows = detectors().map(([title, key]) => mapRow(`Attention: ${title}`, data.maps[key][shown].attention, image));
    for (const [title, levels] of Object.entries((data.maps[method.value] || [])[shown] || {}))
      if (title !== 'attention') rows.push(mapRow(`Mask: ${title}`, levels, image));
    if (!rows.some(row => row.textContent.startsWith('Mask')))
      rows.push(element('p', { class: 'none' }, `There are no masks of ${method.value} to show.`));
    const place = find('.map-rows');
    place.style.setProperty('--picture', `url(${image.source})`);
    place.replaceChildren(...rows);
  }

  function choose() {
    all('[data-method]').forEach(each => { each.hidden = each.dataset.method !== method.value; });
    all('[data-row]').forEach(each => each.classList.toggle('on', each.dataset.row === method.value));
    all('[data-choose]').forEach(each => each.setAttribute('aria-pressed', String(each.dataset.choose === method.value)));
    const on = new Set([method.value, data.plain, 'teacher']);
    all('.grid:not(.still) [data-series]').forEach(each => {
      const chosen = each.dataset.series === method.value;
      each.classList.toggle('on', on.has(each.dataset.series));
      each.classList.toggle('chosen', chosen);
      if (chosen) each.parentNode.append(each);  // above the others
    });
    if (data.images.length) showImage();
  }

  if (!method) return;
  method.addEventListener('change', choose);
  all('[data-choose]').forEach(button => button.addEventListener('click', () => {
    method.value = button.dataset.choose;
    choose();
  }));
  if (data.images.length) {
    slider.addEventListener('input', filter);
    all('[data-image]').forEach(button => button.addEventListener('click', () => {
      shown = Number(button.dataset.image);
      showImage();
    }));
  }
  choose();
}

/** Marks a table while there is more of it on the right. */
function watch(scroll) {
  const update = () => scroll.parentNode.classList.toggle('more', scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - 2);
  scroll.addEventListener('scroll', update, { passive: true });
  new ResizeObserver(update).observe(scroll);
}

document.querySelectorAll('.data').forEach(data => start(data.closest('.study')));
document.querySelectorAll('.scroll').forEach(watch);
