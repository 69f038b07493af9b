// Which tokens of a row an adapter edits: peft_reft.export.edit_mask, for one row without padding.

/** The terms of a notation such as "f7+l7": [{kind: "f", count: 7}, {kind: "l", count: 7}]. */
export function parsePositions(positions) {
  return positions.split("+").map((term) => {
    const match = term.match(/^(?:([flme])([1-9]\d*)|(d)([1-9]\d*)?|(all))$/);
    if (!match) throw new Error(`positions "${positions}": "${term}" is no term; terms are fN, lM, mK, eK, all and dK.`);
    return { kind: match[1] ?? match[3] ?? match[5], count: Number(match[2] ?? match[4] ?? 1) };
  });
}

/**
 * @param shareWeights true: one group; false: one per term; "position": one per position.
 * @param n tokens of the prompt. @param generated tokens behind it.
 * @returns {{mask: Float32Array, groups: number}} 1 where a group's intervention edits, [n + generated, groups].
 */
export function editMask(positions, shareWeights, n, generated = 0) {
  const terms = parsePositions(positions);
  const sum = (kind) => terms.reduce((total, term) => total + (term.kind === kind ? term.count : 0), 0);
  const [first, last] = [sum("f"), sum("l")];
  const prefix = last ? Math.min(first, Math.max(n - last, Math.ceil(n / 2))) : first;
  const middle = (k) => Math.max(0, Math.floor((n - k) / 2));
  const slotOf = { // the position of token i within a term of k tokens, -1 if the term does not name it
    f: (i) => (i < n && i < prefix ? i : -1),
    l: (i) => (i < n && i >= Math.max(prefix, n - last) ? i - n + last : -1),
    m: (i, k) => (i < n && i >= middle(k) && i < middle(k) + k ? i - middle(k) : -1),
    e: (i, k) => (i < n && i % k === k - 1 ? 0 : -1),
    d: (i, k) => (i >= n && (i - n) % k === k - 1 ? 0 : -1),
    all: (i) => (i < n ? 0 : -1),
  };
  const widths = terms.map((term) => (shareWeights === "position" ? term.count : 1));
  const groups = shareWeights === true ? 1 : widths.reduce((total, width) => total + width, 0);
  const mask = new Float32Array((n + generated) * groups);
  for (let i = 0; i < n + generated; i++) {
    for (let t = 0, group = 0; t < terms.length; group += widths[t++]) {
      const slot = slotOf[terms[t].kind](i, terms[t].count);
      if (slot < 0) continue;
      mask[i * groups + (shareWeights === true ? 0 : shareWeights === "position" ? group + slot : group)] = 1;
      break; // a token that two terms name belongs to the first
    }
  }
  return { mask, groups };
}
