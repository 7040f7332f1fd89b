//! Written records follow the published schema, and the schema is strict.

use crate::common;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::Running;
use afterimage_bench::record::Record;
use jsonschema::Validator;
use serde_json::Value;

fn bench() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bench")
}

fn schema() -> Validator {
    let text = fs::read_to_string(bench().join("schema/record.json")).unwrap();
    jsonschema::draft202012::new(&serde_json::from_str(&text).unwrap()).unwrap()
}

fn complaints(schema: &Validator, record: &Value) -> Vec<String> {
    schema.iter_errors(record).map(|e| format!("{}: {e}", e.instance_path())).collect()
}

fn record() -> Value {
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let args = ["bench", &memo.place(), "--json", "--count", "1000", "--warm-up", "0s"];
    let printed = common::run(&args).succeeded();
    let mut record: Record = serde_json::from_str(&printed).unwrap();
    record.figures.insert("a figure".into(), 1.5);
    record.text.push("a line".into());
    serde_json::to_value(record).unwrap()
}

#[test]
fn a_new_record_follows_the_schema_and_uses_all_of_it() {
    let (schema, mut record) = (schema(), record());
    assert_eq!(complaints(&schema, &record), [""; 0]);
    // A field that the schema does not know, or one that is missing, is found.
    let report = record["runs"][0]["report"].as_object_mut().unwrap();
    report.insert("surprise".into(), 1.into());
    assert_eq!(complaints(&schema, &record).len(), 1);
    let report = record["runs"][0]["report"].as_object_mut().unwrap();
    report.remove("surprise");
    for field in ["timeline", "histograms", "started_unix_s"] {
        assert!(report.contains_key(field), "{field}");
    }
    report.remove("sent");
    assert!(complaints(&schema, &record)[0].contains("sent"));
    record["date"] = "yesterday".into();
    assert_eq!(complaints(&schema, &record).len(), 2);
}

#[test]
fn every_committed_record_follows_the_schema() {
    let schema = schema();
    let mut seen = 0;
    for entry in fs::read_dir(bench().join("records")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let record = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            assert_eq!(complaints(&schema, &record), [""; 0], "{}", path.display());
            Record::read(&path).unwrap();
            seen += 1;
        }
    }
    assert!(seen > 0);
}
