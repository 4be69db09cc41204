"""`hf-jd sft | dpo | reward | kto | grpo`: TRL's scripts with the flags of Jacobian descent."""
