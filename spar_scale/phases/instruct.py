"""Training stage 3: supervised fine-tuning of what phase align/joint trained, by the same builder."""

from __future__ import annotations

from dataclasses import replace

from spar_scale.phases import align_joint

PHASE = replace(
    align_joint.PHASE,
    name="instruct",
    training_stage="instruct",
    stage_number=3,
    phase="joint",
    trains="the same as align joint, with more edits",
    starts_from=("align_joint",),
    evaluated_as="final",
    slurm_script="stage3_instruct.sh",
)
build = align_joint.build
