"""A run that fits a laptop: the same code path at toy sizes. Its sizes allow TP2 x PP2 x CP2, PP2 x VP2 x TP2, CP4, PP4 and DP3."""

from __future__ import annotations

from megasora.config.schema import (
    CheckpointConfig,
    ConditionConfig,
    DataConfig,
    EncodersConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)


def tiny() -> RunConfig:
    """3 double and 5 single blocks of width 128 on 64px clips; makes its own clips and encoders when none are given."""
    return RunConfig(
        recipe="tiny",
        model=ModelConfig(
            hidden_size=128,
            num_attention_heads=8,
            num_double_blocks=3,
            num_single_blocks=5,
            ffn_hidden_size=512,
            in_channels=64,
            text_dim=64,
            vec_dim=32,
            axes_dim=(4, 6, 6),
        ),
        precision=PrecisionConfig(dtype="fp32"),
        data=DataConfig(
            resolution="64px",
            frame_counts=(17, 9, 1),
            global_tokens=600,
            num_microbatches=2,
            text_tokens=16,
            dropout_t5=0.1,
            dropout_clip=0.1,
        ),
        condition=ConditionConfig(t2v=1.0, i2v_head=1.0),
        encoders=EncodersConfig(dtype="fp32"),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10, ema_decay=0.95),
        checkpoint=CheckpointConfig(interval_steps=10, keep=3),
        evaluation=EvalConfig(interval_steps=10),
        sample=SampleConfig(height=64, width=64, num_frames=17, fps=12.0, steps=10, guidance=2.0),
        train=TrainConfig(steps=20),
    )
