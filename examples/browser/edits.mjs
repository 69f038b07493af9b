// An adapter's file (safetensors, a few kilobytes) as the inputs of a backbone; what does not fit is refused.

import { editMask } from "./mask.mjs";

const NAMES = ["down", "bias", "up"];

/** Reads a file that peft_reft.export.save_adapter_tensors wrote. */
export function readEdits(buffer) {
  const cut = new Error("The adapter's file is damaged or was cut off. Fetch it again.");
  if (buffer.byteLength < 8) throw cut;
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  if (size > buffer.byteLength - 8) throw cut;
  let header;
  try {
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  } catch {
    throw cut;
  }
  const meta = header.__metadata__ ?? {};
  if (meta.format !== "peft_reft.edits") {
    throw new Error("This is no file of edits. `python -m peft_reft export --adapter DIR OUT` makes one of an adapter.");
  }
  if (meta.version !== "1") throw new Error(`The adapter's file has version ${meta.version} of its format; this is 1.`);
  const missing = NAMES.find((name) => !header[name]);
  if (missing) throw new Error(`The adapter's file has no "${missing}".`);
  const tensors = {};
  for (const name of NAMES) {
    if (8 + size + header[name].data_offsets[1] > buffer.byteLength) throw cut;
    tensors[name] = numbers(buffer, 8 + size, header[name]);
    if (tensors[name].some((number) => !Number.isFinite(number))) {
      throw new Error("The adapter's file holds numbers that are infinite or NaN.");
    }
  }
  const [blocks, shareWeights] = [described(meta, "blocks"), described(meta, "share_weights")];
  const [, groups, rank, width] = header.down.shape;
  const shapes = { down: [blocks.length, groups, rank, width], bias: [blocks.length, groups, rank] };
  shapes.up = shapes.down;
  const odd = NAMES.find((name) => String(header[name].shape) !== String(shapes[name]) || tensors[name].length !== product(shapes[name]));
  if (odd) throw new Error(`The adapter's file has "${odd}" of the shape [${header[odd].shape}], where [${shapes[odd]}] is needed.`);
  const own = editMask(meta.positions, shareWeights, 1).groups; // throws for a notation that this page does not know
  if (own !== groups) {
    throw new Error(`The adapter's file has ${groups} interventions for each block, and positions "${meta.positions}" need ${own}.`);
  }
  return { ...tensors, groups, rank, width, blocks, shareWeights, positions: meta.positions, baseModel: meta.base_model };
}

/** The inputs down, bias and up of a backbone: zeros for blocks that the adapter leaves alone, and up to its sizes. */
export function fitEdits(edits, backbone) {
  const other = `it belongs to another model${edits.baseModel ? `, "${edits.baseModel}"` : ""}.`;
  if (edits.width !== backbone.width) {
    throw new Error(`The adapter edits hidden states of width ${edits.width}, the backbone's have ${backbone.width}: ${other}`);
  }
  if (edits.baseModel && backbone.base_model && edits.baseModel !== backbone.base_model) {
    throw new Error(`The adapter was trained on "${edits.baseModel}", and the backbone is "${backbone.base_model}".`);
  }
  const places = edits.blocks.map((name) => backbone.blocks.indexOf(name));
  if (places.includes(-1)) {
    throw new Error(`The adapter edits "${edits.blocks[places.indexOf(-1)]}", which the backbone has not: ${other}`);
  }
  const [rank, groups] = [backbone.max_rank ?? edits.rank, backbone.max_groups ?? edits.groups];
  if (edits.rank > rank) throw new Error(`The adapter has rank ${edits.rank}; the backbone takes at most ${rank}.`);
  if (edits.groups > groups) {
    throw new Error(`The adapter has ${edits.groups} position groups; the backbone takes at most ${groups}.`);
  }
  const blocks = backbone.blocks.length;
  const found = { rank, groups };
  for (const name of NAMES) {
    const width = name === "bias" ? 1 : edits.width;
    found[name] = new Float32Array(blocks * groups * rank * width);
    for (let b = 0; b < places.length; b++) {
      for (let g = 0; g < edits.groups; g++) {
        const from = (b * edits.groups + g) * edits.rank * width;
        found[name].set(edits[name].subarray(from, from + edits.rank * width), (places[b] * groups + g) * rank * width);
      }
    }
  }
  return found;
}

const product = (shape) => shape.reduce((size, dim) => size * dim, 1);

/** A field of a file's metadata, which is JSON. */
function described(meta, name) {
  try {
    return JSON.parse(meta[name]);
  } catch {
    throw new Error(`The adapter's file does not say its ${name}: ${meta[name]}.`);
  }
}

function numbers(buffer, start, { dtype, data_offsets: [begin, end] }) {
  const bytes = buffer.slice(start + begin, start + end);
  if (dtype === "F32") return new Float32Array(bytes);
  if (dtype === "F16") return Float32Array.from(new Uint16Array(bytes), half);
  if (dtype === "BF16") return new Float32Array(Uint32Array.from(new Uint16Array(bytes), (bits) => bits << 16).buffer);
  throw new Error(`The adapter's numbers are stored as ${dtype}; this page reads F16, BF16 and F32.`);
}

/** The number whose bits in half precision these are. */
function half(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 0x1f, bits & 0x3ff];
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
