//! Flags, the environment and the settings file: which beats which, and what is told of them.

use std::process::Command;

use crate::common::{Running, file, folder, run, run_with, text};

use crate::shared::{SECRET, nobody, welcome};

#[test]
fn a_setting_that_does_not_exist_is_named_with_its_file() {
    let folder = folder();
    for (settings, named) in [
        ("[serve]\nthread = 1", "\"thread\""),
        ("[surf]\nthreads = 1", "[surf]"),
        ("threads = 1", "\"threads\""),
        ("[serve\n", "TOML"),
    ] {
        let path = file(&folder, "settings.toml", settings);
        let line = run(&["serve", "--config", &path]).failed_with_first_line();
        assert!(line.contains(named) && line.contains(&path), "{line}");
    }
}

#[test]
fn a_wrong_value_is_told_of_where_it_stands() {
    let folder = folder();
    for (command, flag, value) in [
        ("serve", "threads", "many"),
        ("cache", "memory", "12 parsecs"),
        ("train", "features", "magic"),
        ("stats", "timeout", "5"),
    ] {
        let path = file(&folder, "settings.toml", format!("[{command}]\n{flag} = \"{value}\""));
        let line = run(&[command, "--config", &path]).failed_with_a_line();
        let named = format!("settings file {path}: {flag} is {value:?}: ");
        assert!(line.contains(&named) && !line.contains("--"), "{line}");

        let variable = format!("AFTERIMAGE_{}", flag.to_uppercase());
        let set = |process: &mut Command| {
            process.env(&variable, value);
        };
        let line = run_with(&[command], set).failed_with_a_line();
        let named = format!("the environment variable {variable} is {value:?}: ");
        assert!(line.contains(&named) && !line.contains("--"), "{line}");
        // The environment beats the file, and the flag beats both.
        let line = run_with(&[command, "--config", &path], set).failed_with_a_line();
        assert!(line.contains(&named), "{line}");
        let done = run_with(&[command, &format!("--{flag}"), "?"], set);
        assert!(done.stderr.contains(&format!("--{flag}")), "{done:#?}");
    }
    let path = file(&folder, "settings.toml", "log = \"debgu\"");
    let line = run(&["serve", "--config", &path]).failed_with_a_line();
    assert!(line.contains("log is \"debgu\": \"debgu\" is no level"), "{line}");
}

#[test]
fn settings_that_exclude_each_other_are_told_of_by_the_names_they_stand_under() {
    let folder = folder();
    let token_file = file(&folder, "token", "sesame");
    for command in ["serve", "stats"] {
        let both = |process: &mut Command| {
            process.env("AFTERIMAGE_TOKEN", "sesame").env("AFTERIMAGE_TOKEN_FILE", &token_file);
        };
        let args =
            [&[command][..], if command == "stats" { &["127.0.0.1:1"] } else { &[] }].concat();
        let line = run_with(&args, both).failed_with_a_line();
        let named = "AFTERIMAGE_TOKEN_FILE and AFTERIMAGE_TOKEN are both set";
        let turned = "AFTERIMAGE_TOKEN and AFTERIMAGE_TOKEN_FILE are both set";
        assert!(line.contains(named) || line.contains(turned), "{line}");
        assert!(!line.contains("--") && !line.contains("sesame"), "{line}");
        // On the command line they are flags; one that beats the environment is none too many.
        let done = run(&[&args[..], &["--token", "x", "--token-file", &token_file]].concat());
        assert!(done.stderr.contains("'--token <TOKEN>' cannot be used with"), "{done:#?}");
        let settings = format!("[{command}]\ntoken = \"sesame\"\ntoken-file = \"{token_file}\"");
        let settings = file(&folder, "settings.toml", settings);
        let line = run(&[&args[..], &["--config", &settings]].concat()).failed_with_a_line();
        assert!(line.contains("token and token-file are both set"), "{line}");
    }
}

#[test]
fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
    let folder = folder();
    let settings = "[cache]\nmemory = \"8MiB\"\nwindow = 11\nmax-body = \"64KiB\"\n\
                    insecure = false\nlisten = \"127.0.0.1:0\"\n[memo]\nwindow = 99\n";
    let path = file(&folder, "settings.toml", settings);
    let window = |args: &[&str], env: &[(&str, &str)]| {
        let service = Running::start_with_env(&[&["cache"], args].concat(), env);
        let welcome = welcome(&service);
        (welcome.window, welcome.max_body)
    };
    let config = ["--config", path.as_str()];
    let variable = ("AFTERIMAGE_WINDOW", "22");
    assert_eq!(window(&["--memory", "8MiB"], &[]), (16_384, 1 << 20));
    assert_eq!(window(&config, &[]), (11, 64 << 10));
    assert_eq!(window(&[], &[("AFTERIMAGE_CONFIG", &path)]), (11, 64 << 10));
    assert_eq!(window(&config, &[variable]), (22, 64 << 10));
    assert_eq!(window(&[&config[..], &["--window", "33"]].concat(), &[variable]), (33, 64 << 10));
    assert_eq!(window(&["--memory", "8MiB", "--window", "33"], &[variable]), (33, 1 << 20));
    // Each setting by itself: one from the flag, another from the environment.
    let variables = [variable, ("AFTERIMAGE_MAX_BODY", "32KiB")];
    assert_eq!(window(&[&config[..], &["--window", "33"]].concat(), &variables), (33, 32 << 10));
}

#[test]
fn every_command_takes_its_settings_from_the_environment_and_from_the_file() {
    let folder = folder();
    let addr = nobody();
    let path = file(&folder, "settings.toml", "[stats]\ntimeout = \"wrong\"\n[demo]\nimages = 7");
    // Seen by what it complains of.
    let line = run(&["demo", "--config", &path]).failed_with_no_more_than_logs();
    assert!(line.contains("--images is 7"), "{line}");
    let done = run_with(&["demo", "--config", &path], |command| {
        command.env("AFTERIMAGE_IMAGES", "8");
    });
    assert!(done.failed_with_no_more_than_logs().contains("--images is 8"));
    let done = run(&["stats", &addr, "--config", &path]);
    assert!(!done.status.success() && done.stderr.contains("wrong"), "{done:#?}");
    let done = run_with(&["bench", &addr], |command| {
        command.env("AFTERIMAGE_COUNT", "none");
    });
    assert!(!done.status.success() && done.stderr.contains("none"), "{done:#?}");
}

#[test]
fn a_token_flag_beats_a_token_of_the_settings_file() {
    let folder = folder();
    let token = file(&folder, "token", SECRET);
    let settings = "[cache]\ntoken = \"of-the-file\"\nmemory = \"8MiB\"";
    let path = file(&folder, "settings.toml", settings);
    let cache = Running::start(&["cache", "--config", &path, "--token-file", &token]);
    run(&["stats", &cache.place(), "--token", SECRET]).succeeded();
}

#[test]
fn a_flag_that_needs_another_finds_it_in_the_settings_file() {
    let folder = folder();
    let snapshot = text(folder.path().join("snapshot"));
    let settings = format!("[cache]\nsnapshot = {snapshot:?}\n[bench]\nrate = 500.0");
    let path = file(&folder, "settings.toml", settings);
    let args = ["cache", "--memory", "8MiB", "--snapshot-every", "1h"];
    let cache = Running::start(&[&args[..], &["--config", &path]].concat());
    let bench = ["bench", &cache.place(), "--poisson", "--count", "50"];
    run(&[&bench[..], &["--warmup", "0s", "--config", &path]].concat()).succeeded();
    // And without it there, says so.
    let line = run(&[&args[..], &["--listen", "127.0.0.1:0"]].concat());
    assert!(line.failed_with_no_more_than_logs().contains("--snapshot-every needs --snapshot"));
    let line = run(&bench).failed_with_no_more_than_logs();
    assert!(line.contains("--poisson needs --rate"), "{line}");
}
