#!/usr/bin/env bash
# The training ladder on the tiny world: every stage in order, from nothing to a
# generator that streams in four steps, with the scores of each stage.
#
#   launch/tiny_ladder.sh [FOLDER]   default runs/ladder; 3 hours of training on two
#                                    cores (5 CPU-hours), and half an hour of scores
#
# The same command resumes a stopped run. A stage is not trained if FOLDER has it as a
# bundle: copy launch/ladder/teacher to FOLDER/teacher to start after the teacher. At
# the end FOLDER/bundle holds the weights. FOLDER/results.json and FOLDER/results.md
# hold the scores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-runs/ladder}"
mkdir -p "$folder"

is_bundle() { # NAME
  [[ -f "$folder/$1/model.safetensors" ]]
}

train() { # CONFIG NAME [FLAGS]: does nothing if the run has ended
  is_bundle "$2" || \
    anchor-jax train --config="configs/$1" --config.out="$folder/$2" "${@:3}"
}

score() { # NAME WEIGHTS [FLAGS]: does nothing if the scores exist
  [[ -f "$folder/$1.json" ]] || anchor-jax score --config=configs/tiny.py \
    --config.weights="$2" --out="$folder/$1.json" "${@:3}"
}

guided=(--config.sampler.solver=euler --config.sampler.guidance=2.5)
clips=(--config.policy=wan_teacher --config.frames=21 --batch=24 --count=240)

if ! is_bundle teacher; then
  train train_teacher.py teacher6
  train train_teacher.py:21 teacher21 --config.weights="$folder/teacher6"
  train train_teacher.py:more teacher --config.weights="$folder/teacher21"
fi
score teacher_clips "$folder/teacher" "${guided[@]}" "${clips[@]}" \
  --config.sampler.num_steps=20
python launch/ladder_results.py gate "$folder"

train train_causal.py causal --config.weights="$folder/teacher"
for steps in 20 4; do
  for trial in switch events; do
    score "causal${steps}_$trial" "$folder/causal" "${guided[@]}" --trial=$trial \
      --config.sampler.num_steps=$steps --count=200
  done
done

train train_causal.py:guided guided --config.weights="$folder/causal" \
  --config.teacher="$folder/causal"
train train_dmd.py:tiny dmd --config.weights="$folder/guided" \
  --config.teacher="$folder/teacher"
train train_streaming.py:tiny streaming --config.weights="$folder/dmd" \
  --config.teacher="$folder/teacher"
for stage in guided dmd streaming; do
  score "${stage}_switch" "$folder/$stage" --count=240
  score "${stage}_events" "$folder/$stage" --trial=events --count=200
done
score streaming_minute "$folder/streaming" --trial=minute --count=40

if ! is_bundle bundle; then
  rm -rf "$folder/bundle"
  anchor-jax export --layout=bundle --weights="$folder/streaming" --out="$folder/bundle"
fi
python launch/ladder_results.py table "$folder"
