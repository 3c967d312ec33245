#!/bin/sh
# SPDX-License-Identifier: MIT
# Makes the pictures of README.md, from the bundled model, into FOLDER (default tests/pictures).
#
#   sh tests/pictures.sh [FOLDER]      ACTPATCH_BIN: the program, default ./actpatch
set -eu
to=$(cd "${1:-$(dirname "$0")/pictures}" && pwd)
cd "$(dirname "$0")/.."
actpatch=${ACTPATCH_BIN:-./actpatch}
tiny=tests/tiny
export ACTPATCH_MODEL=$tiny/model.bin

"$actpatch" patch $tiny/ioi.tsv --sweep resid_pre --normalize -o "$to/resid_pre.svg"
"$actpatch" patch $tiny/ioi.tsv --sweep block_every --normalize -o "$to/block_every.svg"
"$actpatch" patch $tiny/ioi.tsv --sweep attn_head_out_all_pos --normalize -o "$to/heads.svg"
"$actpatch" lens $tiny/ioi.tsv -o "$to/lens.svg"
rm "$to/lens-layers.svg" "$to/lens-heads.svg" "$to/lens-lens.svg"
mv "$to/lens-accumulated.svg" "$to/lens.svg"
head -n 2 $tiny/facts.tsv | "$actpatch" trace - --window 2 -o "$to/trace.svg"
