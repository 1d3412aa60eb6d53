"""MMLU (Hendrycks et al. 2021): 57 subjects, each with tasks of its own, in four areas.

Results are summed up over all subjects (data set `mmlu`) and by area (family).
"""

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin

_ORIGIN = Origin(
    "mmlu",
    {"subject": str, "question": str, "choices": [str], "answer": int},
    {"validation": 1531, "test": 14042, "dev": 285},
    huggingface=HuggingFace("cais/mmlu", "all"),
)

_DEV = 5  # questions of each subject, for exemplars

# Questions in the test of each subject, by area (as the authors' categories.py groups them).
AREAS = {
    "stem": {
        "abstract_algebra": 100,
        "astronomy": 152,
        "college_biology": 144,
        "college_chemistry": 100,
        "college_computer_science": 100,
        "college_mathematics": 100,
        "college_physics": 102,
        "computer_security": 100,
        "conceptual_physics": 235,
        "electrical_engineering": 145,
        "elementary_mathematics": 378,
        "high_school_biology": 310,
        "high_school_chemistry": 203,
        "high_school_computer_science": 100,
        "high_school_mathematics": 270,
        "high_school_physics": 151,
        "high_school_statistics": 216,
        "machine_learning": 112,
    },
    "humanities": {
        "formal_logic": 126,
        "high_school_european_history": 165,
        "high_school_us_history": 204,
        "high_school_world_history": 237,
        "international_law": 121,
        "jurisprudence": 108,
        "logical_fallacies": 163,
        "moral_disputes": 346,
        "moral_scenarios": 895,
        "philosophy": 311,
        "prehistory": 324,
        "professional_law": 1534,
        "world_religions": 171,
    },
    "social_sciences": {
        "econometrics": 114,
        "high_school_geography": 198,
        "high_school_government_and_politics": 193,
        "high_school_macroeconomics": 390,
        "high_school_microeconomics": 238,
        "high_school_psychology": 545,
        "human_sexuality": 131,
        "professional_psychology": 612,
        "public_relations": 110,
        "security_studies": 245,
        "sociology": 201,
        "us_foreign_policy": 100,
    },
    "other": {
        "anatomy": 135,
        "business_ethics": 100,
        "clinical_knowledge": 265,
        "college_medicine": 173,
        "global_facts": 100,
        "human_aging": 223,
        "management": 103,
        "marketing": 234,
        "medical_genetics": 100,
        "miscellaneous": 783,
        "nutrition": 306,
        "professional_accounting": 282,
        "professional_medicine": 272,
        "virology": 166,
    },
}

DATASETS = tuple(
    Dataset(
        f"mmlu_{subject}",
        "mmlu",
        _ORIGIN,
        family=f"mmlu_{area}",
        metric_fns=(metrics.accuracy,),
        prompts="mmlu",
        group="mmlu",
        trained=False,
        only=("subject", subject),
        sizes={"test": size, "dev": _DEV},
        license="MIT",
        citation="Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding",
    )
    for area, subjects in AREAS.items()
    for subject, size in subjects.items()
)
