//! The help screens.

use crate::common::run;

const COMMANDS: [&str; 20] = [
    "ping",
    "doctor",
    "completions",
    "man",
    "proxy",
    "gateway",
    "forget",
    "flush",
    "serve",
    "cache",
    "classifier",
    "memo",
    "classify",
    "train",
    "eval",
    "import",
    "demo",
    "bench",
    "stats",
    "snapshot",
];

#[test]
fn every_commands_help_explains_every_flag() {
    for command in COMMANDS {
        let help = run(&[command, "--help"]).succeeded();
        assert!(help.lines().next().is_some_and(|line| line.len() > 10), "{help}");
        assert!(help.contains(&format!("Usage: afterimage {command}")), "{help}");
        let lines: Vec<&str> = help.lines().map(str::trim).collect();
        let mut flags = 0;
        for (i, line) in lines.iter().enumerate() {
            let line = line.strip_prefix("-h, ").unwrap_or(line);
            let Some(flag) = line.strip_prefix("--") else { continue };
            flags += 1;
            // The purpose stands behind two spaces, or on the next line.
            let next = || lines[i + 1];
            let purpose = flag.split_once("  ").map_or_else(next, |(_, purpose)| purpose.trim());
            assert!(purpose.len() > 9, "{command}: no purpose of --{flag} in\n{help}");
            assert!(!purpose.starts_with(['-', '[']), "{command}: --{flag} has {purpose:?}");
        }
        assert!(flags >= 4, "{help}");
    }
}

#[test]
fn the_programs_help_names_every_command_and_the_settings() {
    let help = run(&["--help"]).succeeded();
    for command in COMMANDS {
        assert!(help.contains(&format!("  {command} ")), "{command} in\n{help}");
    }
    assert!(help.contains("AFTERIMAGE_") && help.contains("--config"), "{help}");
    assert!(run(&["--version"]).succeeded().starts_with("afterimage "));
}
