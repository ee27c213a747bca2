#!/bin/sh
# The demonstration: asks the built-in model one question about a clip, prints question and answer, and
# fails when the answer is not the expected one.
#
#   demo.sh [CLIP [QUESTION]]     CLIP is a file of testdata/demo
set -eu

cd "$(dirname "$0")/../.."
clip=${1:-left.mp4}
question=${2:-Which way does it move?}
answers=testdata/demo/answers.json

[ -f "$answers" ] || { echo "$answers is missing: the checkout is incomplete" >&2; exit 1; }

# One object a line, then plain text search: no JSON program is needed.
expected=$(tr '\n}' ' \n' <"$answers" |
    grep -F "\"file\": \"$clip\"" |
    grep -F "\"question\": \"$question\"" |
    sed -n 's/.*"answer": "\([^"]*\)".*/\1/p' | head -n 1)
[ -n "$expected" ] || { echo "$answers has no answer for $clip: $question" >&2; exit 1; }

case $clip in
    *.mp4 | *.webm | *.mkv | *.avi | *.mov) kind=--video ;;
    *) kind=--image ;;
esac

echo "\$ lnv ask $kind testdata/demo/$clip \"$question\""
echo "Question: $question"
answer=$(cargo run --quiet --release --locked --package lnv-cli -- \
    ask "$kind" "testdata/demo/$clip" "$question")
echo "Answer:   $answer"
if [ "$answer" != "$expected" ]; then
    echo "The answer is wrong: expected \"$expected\"." >&2
    exit 1
fi
