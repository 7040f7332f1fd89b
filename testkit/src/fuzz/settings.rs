//! The fuzz target of the settings file.

use std::ffi::OsString;
use std::fs;

use afterimage::settings::{apply, misplaced};

use super::{Seed, Temporary};

/// Any text as the settings file of `command`, whose subcommand `cache` has a flag `--listen`. The
/// settings are accepted or refused with a reason, and a given flag overrides them.
pub(super) fn settings(data: &[u8]) {
    let command = afterimage::command();
    let text = String::from_utf8_lossy(data);
    let file = Temporary::new();
    fs::write(&file.0, text.as_bytes()).expect("a temporary file can be written");
    let args = [OsString::from("--config"), file.0.clone().into()];
    let is_toml = text.parse::<toml::Table>().is_ok();
    let names: Vec<String> =
        command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command = match apply(command, args.iter().cloned()) {
        Ok(command) => command,
        Err(error) => return assert!(error.to_string().contains("settings file"), "{error:#}"),
    };
    assert!(is_toml, "invalid TOML was accepted");
    for name in &names {
        // The flags check their own settings. A wrong one is an error with a text, which names the
        // file if the setting is in it.
        if let Err(error) = command.clone().try_get_matches_from(["afterimage", name]) {
            assert!(!error.to_string().is_empty());
            if let Some(error) = misplaced(&command, &error, &args) {
                assert!(error.to_string().contains("settings file"), "{error:#}");
            }
        }
    }
    let given = ["afterimage", "cache", "--listen", "192.0.2.1:1"];
    if let Ok(matches) = command.try_get_matches_from(given) {
        let (_, cache) = matches.subcommand().expect("a subcommand was given");
        let listen = cache.get_one::<String>("listen").map(String::as_str);
        assert_eq!(listen, Some("192.0.2.1:1"), "a flag beats the file");
    }
}

/// Files with valid settings and with wrong ones.
pub(super) fn seeds() -> Vec<Seed> {
    [
        ("empty", ""),
        ("listen", "[cache]\nlisten = \"127.0.0.1:1\"\n"),
        ("flag", "[cache]\ninsecure = true\nmax-connections = 7\n[memo]\nlisten = \"[::1]:2\"\n"),
        ("list", "[memo]\nclassifier = [\"127.0.0.1:1\", \"127.0.0.1:2\"]\n"),
        ("wrong_type", "[cache]\nlisten = {}\nmax-connections = 1.5\n"),
        ("unknown", "[cash]\nlisten = 1\n"),
        ("outside", "listen = 1\n"),
        ("truth", "[cache]\ninsecure = \"maybe\"\nlisten = \"\"\"a\nb\"\"\"\n"),
        ("date", "[cache]\nlisten = 1979-05-27T07:32:00Z\nmax-connections = [[1], []]\n"),
        ("unicode", "# é\n[cache]\nlisten = '\u{1F680}'\n"),
    ]
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .into()
}
