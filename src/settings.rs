//! Settings from a file and from the environment, for every flag there is: each becomes the flag's
//! default, so that names, types and checks are the flag's own.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::builder::ArgPredicate;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

/// What the environment variables of this program begin with.
const ENV_PREFIX: &str = "AFTERIMAGE_";

/// Gives every flag of `command` its environment variable, and the default that the settings file
/// named by `--config` (or `AFTERIMAGE_CONFIG`) has for it.
pub fn apply(command: Command, args: impl Iterator<Item = OsString>) -> anyhow::Result<Command> {
    let args: Vec<OsString> = args.collect();
    let command = with_environment(command, &given(&args));
    match config_path(args.into_iter()) {
        None => Ok(command),
        Some(path) => {
            let file = path.display();
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read the settings file {file}"))?;
            with_file(command, &text).with_context(|| format!("settings file {file}"))
        }
    }
}

/// A wrong value that stands in the environment or in the settings file, told of as what it is:
/// clap takes every value for one of the flag. `None` for an error that is of another kind, or the
/// command line's own.
pub fn misplaced(error: &clap::Error, args: &[OsString]) -> Option<anyhow::Error> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        Some(ContextValue::Strings(texts)) => texts.first().map(String::as_str),
        _ => None,
    };
    if error.kind() == ErrorKind::ArgumentConflict {
        let flags = [text(ContextKind::InvalidArg)?, text(ContextKind::PriorArg)?];
        return exclude_each_other(flags.map(flag_name), args);
    }
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return None;
    }
    let flag = flag_name(text(ContextKind::InvalidArg)?)?;
    if given(args).iter().any(|given| given == flag) {
        return None;
    }
    let reason = match (std::error::Error::source(error), error.get(ContextKind::ValidValue)) {
        (Some(reason), _) => reason.to_string(),
        (None, Some(ContextValue::Strings(valid))) => format!("it is one of {}", valid.join(", ")),
        _ => "that is no value for it".into(),
    };
    let value = text(ContextKind::InvalidValue).unwrap_or_default();
    let variable = variable(flag);
    Some(if std::env::var_os(&variable).is_some() {
        anyhow::anyhow!("the environment variable {variable} is {value:?}: {reason}")
    } else {
        let file = config_path(args.iter().cloned())?;
        anyhow::anyhow!("settings file {}: {flag} is {value:?}: {reason}", file.display())
    })
}

/// The name of a flag that clap writes with its value: `--flag <VALUE>`.
fn flag_name(written: &str) -> Option<&str> {
    written.strip_prefix("--")?.split([' ', '=']).next()
}

/// Two settings of which one may be set, by the names under which they are. `None` when both are
/// flags, of which clap tells as well.
fn exclude_each_other(flags: [Option<&str>; 2], args: &[OsString]) -> Option<anyhow::Error> {
    let given = given(args);
    let is_given = |flag: &str| given.iter().any(|given| given == flag);
    let [one, other] = flags.map(|flag| {
        let flag = flag?;
        Some(if is_given(flag) { format!("--{flag}") } else { variable(flag) })
    });
    let (one, other) = (one?, other?);
    let from_environment = [&one, &other].iter().any(|name| name.starts_with(ENV_PREFIX));
    from_environment.then(|| anyhow::anyhow!("{one} and {other} are both set: set one of them"))
}

/// The environment variable of a flag.
fn variable(flag: &str) -> String {
    format!("{ENV_PREFIX}{}", flag.to_uppercase().replace('-', "_"))
}

/// The file that `--config` names: looked for before parsing, since it decides the defaults.
fn config_path(mut args: impl Iterator<Item = OsString>) -> Option<PathBuf> {
    while let Some(arg) = args.next() {
        if arg == "--" {
            break;
        }
        if arg == "--config" {
            return args.next().map(PathBuf::from);
        }
        if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--config=")) {
            return Some(PathBuf::from(path));
        }
    }
    std::env::var_os(format!("{ENV_PREFIX}CONFIG")).map(PathBuf::from)
}

/// The names of the flags on the command line.
fn given(args: &[OsString]) -> Vec<String> {
    let flags = args.iter().filter_map(|arg| arg.to_str()?.strip_prefix("--"));
    flags.map(|flag| flag.split('=').next().unwrap_or(flag).to_owned()).collect()
}

fn with_environment(command: Command, given: &[String]) -> Command {
    let names: Vec<String> =
        command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let beaten = beaten_by(&command, given);
    let command = command.mut_args(|arg| {
        let Some(name) = setting_name(&arg) else { return arg };
        if beaten.contains(&name) {
            return arg;
        }
        let arg = arg.env(variable(&name)).hide_env(true);
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            return arg.value_parser(clap::builder::BoolishValueParser::new());
        }
        arg
    });
    names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, |sub| with_environment(sub, given))
    })
}

/// The settings that a flag on the command line excludes: it beats their environment variables as
/// it beats its own.
fn beaten_by(command: &Command, given: &[String]) -> Vec<String> {
    let mut beaten = Vec::new();
    for arg in command.get_arguments() {
        for rival in command.get_arg_conflicts_with(arg) {
            if let (Some(one), Some(other)) = (arg.get_long(), rival.get_long()) {
                for (flag, loser) in [(one, other), (other, one)] {
                    if given.iter().any(|given| given == flag) {
                        beaten.push(loser.to_owned());
                    }
                }
            }
        }
    }
    beaten
}

fn with_file(command: Command, text: &str) -> anyhow::Result<Command> {
    let tables: toml::Table = text.parse().map_err(|error| syntax_error(&error, text))?;
    let mut command = command;
    for (name, table) in tables {
        if name == "log" {
            // The one flag that all commands share.
            command = with_table(command, &toml::Table::from_iter([(name, table)]))?;
            continue;
        }
        let toml::Value::Table(table) = table else {
            bail!("{name:?} stands outside of a table; settings belong to a command: [serve], say");
        };
        if !command.get_subcommands().any(|sub| sub.get_name() == name) {
            let known: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
            bail!("there is no command [{name}]; there are {}", known.join(", "));
        }
        command = with_subcommand(command, &name, &table)?;
    }
    Ok(command)
}

/// Gives the subcommand of this name, which there is, the defaults of its table.
fn with_subcommand(command: Command, name: &str, table: &toml::Table) -> anyhow::Result<Command> {
    let mut result = Ok(());
    let command = command.mut_subcommand(name, |sub| match with_table(sub, table) {
        Ok(sub) => sub,
        Err(error) => {
            result = Err(error);
            Command::new("unused")
        }
    });
    result.with_context(|| format!("[{name}]"))?;
    Ok(command)
}

fn with_table(command: Command, table: &toml::Table) -> anyhow::Result<Command> {
    let known: Vec<String> = command.get_arguments().filter_map(setting_name).collect();
    let mut command = command;
    for (name, value) in table {
        let is_command = command.get_subcommands().any(|sub| sub.get_name() == name);
        if let (toml::Value::Table(table), true) = (value, is_command) {
            command = with_subcommand(command, name, table)?;
            continue;
        }
        if !known.contains(name) {
            if name == "log" {
                bail!("\"log\" is for all commands: it stands before the tables");
            }
            bail!("there is no setting {name:?}; there are {}", known.join(", "));
        }
        let values = match value {
            toml::Value::Array(values) => values.iter().map(text_of).collect(),
            value => text_of(value).map(|text| vec![text]),
        };
        let values: Vec<String> = values
            .with_context(|| format!("{name:?} must be a text, a number or a truth value"))?;
        let arg = command
            .get_arguments()
            .find(|arg| arg.get_long() == Some(name))
            .expect("the name is one of the arguments'");
        let id = arg.get_id().to_string();
        // A flag that excludes this one beats the file, as this one's own flag does.
        let rivals = command.get_arg_conflicts_with(arg).into_iter();
        let rivals: Vec<String> = rivals.map(|rival| rival.get_id().to_string()).collect();
        command = command.mut_arg(id, |arg| {
            // What the environment holds and help does not show, it does not show from here either.
            let takes_value = !matches!(arg.get_action(), ArgAction::SetTrue);
            let secret = takes_value
                && (arg.is_hide_env_values_set() || values.iter().any(|value| value.contains('@')));
            let arg = rivals.into_iter().fold(arg, |arg, rival| {
                arg.default_value_if(rival, ArgPredicate::IsPresent, None::<&str>)
            });
            arg.default_values(values).required(false).hide_default_value(secret)
        });
    }
    Ok(command)
}

/// What is wrong with the file, and where, in one line.
fn syntax_error(error: &toml::de::Error, text: &str) -> anyhow::Error {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    anyhow::anyhow!("TOML, line {line}: {}", error.message())
}

/// The name under which an argument can be set: its long flag's.
fn setting_name(arg: &Arg) -> Option<String> {
    let name = arg.get_long()?;
    let can_be_set = !matches!(name, "help" | "version");
    can_be_set.then(|| name.to_owned())
}

fn text_of(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(truth) => Some(truth.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cli;
    use clap::CommandFactory;

    fn listen(file: &str, args: &[&str]) -> anyhow::Result<String> {
        let command = with_file(with_environment(Cli::command(), &[]), file)?;
        let matches = command.try_get_matches_from(args)?;
        let (_, sub) = matches.subcommand().context("no subcommand")?;
        Ok(sub.get_one::<String>("listen").context("no --listen")?.clone())
    }

    #[test]
    fn a_flag_beats_the_file_and_the_file_beats_the_default() {
        let file = "[cache]\nlisten = \"127.0.0.1:1\"";
        assert_eq!(listen("", &["afterimage", "cache"]).unwrap(), "127.0.0.1:7401");
        assert_eq!(listen(file, &["afterimage", "cache"]).unwrap(), "127.0.0.1:1");
        assert_eq!(
            listen(file, &["afterimage", "cache", "--listen", "[::1]:2"]).unwrap(),
            "[::1]:2"
        );
        assert_eq!(listen(file, &["afterimage", "classifier"]).unwrap(), "127.0.0.1:7402");
    }

    #[test]
    fn a_setting_or_a_command_that_does_not_exist_is_named() {
        let error = |file| format!("{:#}", listen(file, &["afterimage", "cache"]).unwrap_err());
        assert!(error("[cache]\nlisten-on = 1").contains("there is no setting \"listen-on\""));
        assert!(error("[cash]\nlisten = 1").contains("there is no command [cash]"));
        assert!(error("listen = 1").contains("outside of a table"));
        assert!(error("[cache]\nlisten = {}").contains("must be a text"));
        assert!(error("[bench.find-max]\np98 = 1").contains("there is no setting \"p98\""));
        assert!(error("[cache").contains("TOML"));
    }

    #[test]
    fn truth_values_and_wrong_values_go_through_the_flags_own_checks() {
        let parse = |file| {
            with_file(with_environment(Cli::command(), &[]), file)
                .unwrap()
                .try_get_matches_from(["afterimage", "cache"])
        };
        let matches = parse("[cache]\ninsecure = true").unwrap();
        assert!(matches.subcommand().unwrap().1.get_flag("insecure"));
        assert!(parse("[cache]\nmax-connections = \"many\"").is_err());
    }

    #[test]
    fn a_flag_beats_the_environment_of_a_flag_that_it_excludes() {
        let beaten = |given: &[&str]| {
            let command = Cli::command();
            let sub = command.find_subcommand("cache").unwrap().clone();
            beaten_by(&sub, &given.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(beaten(&["token-file"]), ["token"]);
        assert_eq!(beaten(&["token"]), ["token-file"]);
        assert!(beaten(&["listen"]).is_empty());
        assert_eq!(given(&["cache".into(), "--token-file=x".into()]), ["token-file"]);
    }

    #[test]
    fn the_log_filter_stands_at_the_top_of_the_file() {
        let command = with_file(with_environment(Cli::command(), &[]), "log = \"debug\"").unwrap();
        let matches = command.try_get_matches_from(["afterimage", "cache"]).unwrap();
        assert_eq!(matches.get_one::<String>("log").unwrap(), "debug");
    }

    #[test]
    fn a_command_of_a_command_has_a_table_in_its_table() {
        let file = "[bench.find-max]\np99 = \"7ms\"";
        let command = with_file(with_environment(Cli::command(), &[]), file).unwrap();
        let matches =
            command.try_get_matches_from(["afterimage", "bench", "find-max", "h:1"]).unwrap();
        let find_max = matches.subcommand_matches("bench").unwrap().subcommand_matches("find-max");
        let p99 = find_max.unwrap().get_one::<crate::args::Time>("p99").unwrap();
        assert_eq!(p99.0, std::time::Duration::from_millis(7));
    }

    #[test]
    fn the_config_flag_is_found_wherever_it_stands() {
        let find = |args: &[&str]| config_path(args.iter().map(OsString::from));
        assert_eq!(find(&["--config", "a", "cache"]), Some("a".into()));
        assert_eq!(find(&["cache", "--config=b"]), Some("b".into()));
    }

    #[test]
    fn the_command_line_is_consistent() {
        with_environment(Cli::command(), &[]).debug_assert();
    }
}
