//! Flags, the environment and the settings file: precedence and errors.

use std::process::Command;

use crate::common::{Running, file, folder, run, run_with, text};

use crate::{SECRET, unused_address, welcome};

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
fn a_wrong_value_is_reported_with_its_source() {
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
    assert!(line.contains("log is \"debgu\": \"debgu\" is not a level"), "{line}");
}

#[test]
fn conflicting_settings_are_named_as_they_were_set() {
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
        // On the command line they are flags, and a flag that overrides the environment is allowed.
        let done = run(&[&args[..], &["--token", "x", "--token-file", &token_file]].concat());
        assert!(done.stderr.contains("'--token <TOKEN>' cannot be used with"), "{done:#?}");
        let settings = format!("[{command}]\ntoken = \"sesame\"\ntoken-file = \"{token_file}\"");
        let settings = file(&folder, "settings.toml", settings);
        let line = run(&[&args[..], &["--config", &settings]].concat()).failed_with_a_line();
        assert!(line.contains("token and token-file are both set"), "{line}");
    }
}

#[test]
fn flags_beat_environment_beats_file_beats_default() {
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
    assert_eq!(window(&["--memory", "8MiB"], &[]), (16_384, 17 << 20));
    assert_eq!(window(&config, &[]), (11, 64 << 10));
    assert_eq!(window(&[], &[("AFTERIMAGE_CONFIG", &path)]), (11, 64 << 10));
    assert_eq!(window(&config, &[variable]), (22, 64 << 10));
    assert_eq!(window(&[&config[..], &["--window", "33"]].concat(), &[variable]), (33, 64 << 10));
    assert_eq!(window(&["--memory", "8MiB", "--window", "33"], &[variable]), (33, 17 << 20));
    // Each setting by itself: one from the flag, another from the environment.
    let variables = [variable, ("AFTERIMAGE_MAX_BODY", "32KiB")];
    assert_eq!(window(&[&config[..], &["--window", "33"]].concat(), &variables), (33, 32 << 10));
}

#[test]
fn every_command_reads_the_environment_and_the_file() {
    let folder = folder();
    let addr = unused_address();
    let path = file(&folder, "settings.toml", "[stats]\ntimeout = \"wrong\"\n[demo]\nimages = 7");
    // Its error shows which setting it used.
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

#[test]
fn an_empty_environment_variable_means_unset() {
    let empty = [
        "SNAPSHOT",
        "MEMORY",
        "ENTRIES",
        "LISTEN",
        "TOKEN",
        "TOKEN_FILE",
        "CONFIG",
        "LOG",
        "THREADS",
        "INSECURE",
        "MAX_BODY",
        "MODEL",
        "SECRET_FILE",
        "AUDIT",
        "TLS_CERT",
        "SERVER",
        "TIMEOUT",
    ];
    let names: Vec<String> = empty.iter().map(|name| format!("AFTERIMAGE_{name}")).collect();
    let empty: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    let args = ["serve", "--memory", "8MiB", "--listen", "127.0.0.1:0"];
    let service = Running::start_with_env(&args, &empty);
    assert_eq!(welcome(&service).max_body, 17 << 20);
    let stats = run_with(&["stats", &service.place()], |command| {
        command.envs(empty.iter().copied());
    });
    assert!(stats.stderr.is_empty(), "{stats:#?}");
    stats.succeeded();
}

#[test]
fn an_unknown_variable_of_ours_is_warned_of() {
    let variables = [("AFTERIMAGE_TOKEN_FLIE", "x"), ("AFTERIMAGE_DURATION", "1s")];
    let service = Running::start_with_env(&["cache", "--memory", "8MiB"], &variables);
    let log = service.log();
    assert!(log.contains("AFTERIMAGE_TOKEN_FLIE is not a setting"), "{log}");
    // A setting of another command.
    assert!(!log.contains("AFTERIMAGE_DURATION"), "{log}");
    let stats = run_with(&["stats", &service.place()], |command| {
        command.envs(variables);
    });
    assert!(stats.stderr.contains("AFTERIMAGE_TOKEN_FLIE is not a setting"), "{stats:#?}");
}

#[test]
fn memory_and_entries_exclude_each_other() {
    let done = run(&["cache", "--memory", "1GiB", "--entries", "1000"]);
    assert_eq!(done.status.code(), Some(2), "{done:#?}");
    assert!(done.stderr.contains("'--memory <SIZE>' cannot be used with"), "{done:#?}");
    let folder = folder();
    let settings = "[cache]\nmemory = \"1GiB\"\nentries = 1000\n";
    let path = file(&folder, "settings.toml", settings);
    let line = run(&["cache", "--config", &path]).failed_with_a_line();
    assert!(line.contains("memory and entries are both set"), "{line}");
    // A flag beats a setting of the file that it excludes.
    let path = file(&folder, "settings.toml", "[cache]\nmemory = \"4000TiB\"\n");
    Running::start(&["cache", "--config", &path, "--entries", "1000"]);
}

#[test]
fn the_former_names_of_store_flags_still_work() {
    let folder = folder();
    let token = file(&folder, "token", SECRET);
    let wants = "--store-token-file needs a remote store";
    let args = ["memo", "--listen", "127.0.0.1:0"];
    let by_flag = run(&[&args[..], &["--cache-token-file", &token]].concat());
    let by_variable = run_with(&args, |command| {
        command.env("AFTERIMAGE_CACHE_TOKEN_FILE", &token);
    });
    let path = file(&folder, "settings.toml", format!("[memo]\ncache-token-file = {token:?}"));
    let by_file = run(&[&args[..], &["--config", &path]].concat());
    for done in [by_flag, by_variable, by_file] {
        let line = done.failed_with_no_more_than_logs();
        assert!(line.contains(wants), "{line}");
    }
    let done = run(&["memo", "--cache", "foo"]);
    assert!(done.stderr.contains("--store <STORE>"), "{done:#?}");
    let line = run_with(&["memo"], |command| {
        command.env("AFTERIMAGE_CACHE", "foo");
    });
    let line = line.failed_with_a_line();
    assert!(line.contains("AFTERIMAGE_CACHE is \"foo\""), "{line}");
}

#[test]
fn no_error_shows_the_password_of_a_url() {
    let url = "redi://:sesame@127.0.0.1:6379";
    let by_flag = run(&["memo", "--store", url]);
    let by_former_flag = run(&["memo", "--cache", url]);
    let by_variable = run_with(&["memo"], |command| {
        command.env("AFTERIMAGE_STORE", url);
    });
    let folder = folder();
    let path = file(&folder, "settings.toml", format!("[memo]\nstore = {url:?}"));
    let by_file = run(&["memo", "--config", &path]);
    for done in [by_flag, by_former_flag, by_variable, by_file] {
        let line = done.failed_with_a_line();
        assert!(line.contains("redi://…@127.0.0.1:6379") && !line.contains("sesame"), "{line}");
    }
}
