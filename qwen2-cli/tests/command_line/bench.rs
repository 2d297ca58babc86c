//! `qwen2 bench`: what it reports.

use super::*;

#[test]
fn bench_reports_what_the_documentation_names() {
    let tied = tied();
    for precision in ["f32", "bf16", "q8", "q4"] {
        let args = [
            "bench",
            &tied,
            "--precision",
            precision,
            "--prompt",
            "16",
            "--new",
            "8",
            "--repeat",
            "1",
            "--threads",
            "1",
            "--json",
        ];
        let value = qwen2(&args).json();
        assert_eq!(
            keys(&value),
            [
                "model",
                "precision",
                "activations",
                "device",
                "threads",
                "prompt",
                "new",
                "repeat",
                "load_s",
                "prefill_tokens_per_s",
                "decode_tokens_per_s",
                "first_token_s",
                "weight_bytes_per_token",
                "resident_bytes",
                "prefill_peak_bytes",
                "cache_bytes",
                "bandwidth_bytes_per_s",
                "decode_bandwidth_share",
            ]
        );
        assert_eq!(
            (&value["precision"], &value["threads"]),
            (&precision.into(), &1.into())
        );
        let number = |key: &str| value[key].as_f64().unwrap();
        for key in [
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "bandwidth_bytes_per_s",
            "decode_bandwidth_share",
        ] {
            assert!(number(key) > 0.0, "{key}: {value}");
        }
    }
}

#[test]
fn bench_profiles_every_part_of_a_forward() {
    let args = [
        "bench",
        &tied(),
        "--prompt",
        "16",
        "--new",
        "8",
        "--repeat",
        "1",
    ];
    let value = qwen2(&[&args[..], &["--profile", "--json"]].concat()).json();
    for (table, unit) in [("prefill", "ms"), ("decode", "us")] {
        let parts = value["profile"][table].as_array().unwrap();
        let names: Vec<_> = parts
            .iter()
            .map(|part| part["part"].as_str().unwrap())
            .collect();
        for name in [
            "norm, q k v",
            "attention",
            "down, add",
            "norm, head",
            "sample",
            "the rest",
        ] {
            assert!(names.contains(&name), "{table}: {names:?}");
        }
        let share: f64 = parts
            .iter()
            .map(|part| part["share"].as_f64().unwrap())
            .sum();
        assert!((share - 1.0).abs() < 1e-6, "{table}: {share}");
        assert!(parts.iter().all(|part| part[unit].is_f64()), "{table}");
    }
    let lines = qwen2(&[&args[..], &["--profile"]].concat()).stdout;
    assert!(lines.contains("decode, µs a token\n"), "{lines}");
}
