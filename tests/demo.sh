#!/bin/sh
# SPDX-License-Identifier: MIT
# The main job on the bundled model: convert the checkpoint, show the prompts' tokens, the logit
# differences and two heat maps. Called by `make demo`, which has built ./actpatch. Where there is no
# Python, the committed flat file takes the converted one's place. Fits in 80 columns.
set -eu
cd "$(dirname "$0")/.."
unset ACTPATCH_MODEL
python=${PYTHON:-python3}
tiny=tests/tiny
prompts=$tiny/ioi.tsv
folder=${TMPDIR:-/tmp}/actpatch-demo-$$
(umask 077 && mkdir "$folder")
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM

say() { printf '\n== %s\n' "$*"; }

# A table as the program prints it, in colour on a terminal. Anywhere else its numbers, of nine digits
# each, are rounded to two decimals, with a dot for what rounds to zero.
show() {
    printf '\n$ ./actpatch %s\n' "$*"
    if [ -t 1 ]; then
        ./actpatch "$@" -m "$model"
        return
    fi
    ./actpatch "$@" -m "$model" > "$folder/table"
    awk 'NR < 3 { print; next }
         NR == 3 { columns = NF; wide = 20 }
         { label = NR == 3 ? "" : $0
           for (i = 0; i < columns; i++) sub(/ +[^ ]+ *$/, "", label)
           line = sprintf("%-*s", wide, label)
           for (i = NF - columns + 1; i <= NF; i++) {
               number = NR == 3 ? $i : sprintf("%.2f", $i)
               if (NR > 3 && number + 0 == 0) number = "."
               line = line sprintf("%8s", number)
           }
           print line }' "$folder/table"
}

say "1. The checkpoint $tiny becomes one flat file"
if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2> /dev/null; then
    model=$folder/model.bin
    printf '\n$ %s convert_weights.py %s -o model.bin\n' "${python##*/}" "$tiny"
    root=$PWD
    (cd "$folder" && "$python" "$root/convert_weights.py" "$root/$tiny" -o model.bin > summary)
    fold -s -w 80 "$folder/summary"
    if cmp -s "$model" "$tiny/model.bin"; then
        echo "It equals $tiny/model.bin, which is committed, byte for byte."
    else
        echo "demo: the converted file differs from $tiny/model.bin" >&2
        exit 1
    fi
else
    model=$tiny/model.bin
    echo "There is no Python 3.8 here, so the committed $model is used."
fi

say "2. Eight prompts as tokens; each also has <|endoftext|> in front"
echo
tab=$(printf '\t')
line=1
while IFS=$tab read -r clean corrupted answer wrong; do
    if [ "$line" -gt 1 ]; then
        printf '%d %s\n' "$line" "$(./actpatch tokens --no-bos -m "$model" "$clean" | sed -n 2p)"
        printf '  answer |%s|, wrong |%s|; corrupted: %s\n' "$answer" "$wrong" "${corrupted#*, }"
    fi
    line=$((line + 1))
done < "$prompts"

say "3. Logit difference, answer - wrong, after every clean and corrupted prompt"
printf '\n$ ./actpatch diff %s\n' "$prompts"
./actpatch diff "$prompts" -m "$model" | expand -t 6,20

say "4. One activation of the clean run is put into the corrupted run: how much of"
echo "   the difference comes back?  0: nothing, 1: all of it"
show patch "$prompts" --sweep resid_pre --normalize
echo
echo "Rows are positions (tokens of the first prompt), columns layers. The second"
echo "mention of a name decides, and what it says moves to the last position."
show patch "$prompts" --sweep attn_head_out_all_pos --normalize
echo
echo "Rows are layers, columns heads: the head that moves it stands out."
