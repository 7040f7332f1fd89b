//! Settings from the environment and from a file, for every flag. Each becomes the flag's default,
//! so that names, types and checks are the flag's own.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::builder::ArgPredicate;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::tls::warn_if_exposed;

/// Prefix of this program's environment variables.
const ENV_PREFIX: &str = "AFTERIMAGE_";

/// The settings of the program itself, before the tables of a settings file.
const GLOBAL: [&str; 2] = ["log", "log-format"];

/// Gives every flag of `command` its environment variable, and its default in the settings file
/// that `--config` (or `AFTERIMAGE_CONFIG`) names.
pub fn apply(command: Command, args: impl Iterator<Item = OsString>) -> anyhow::Result<Command> {
    let args: Vec<OsString> = args.collect();
    let command = with_environment(command, &given(&args));
    match config_path(args.into_iter()) {
        None => Ok(command),
        Some(path) => {
            let file = path.display();
            let text = afterimage_core::file::read_text(&path)
                .with_context(|| format!("cannot read the settings file {file}"))?;
            with_file(command, &text).with_context(|| format!("settings file {file}"))
        }
    }
}

/// The error of a wrong value in the environment or in the settings file, which clap reports as one
/// of the flag; also any error whose text would show a password. `None` for other errors.
pub fn misplaced(
    command: &Command,
    error: &clap::Error,
    args: &[OsString],
) -> Option<anyhow::Error> {
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
    let reason = match (std::error::Error::source(error), error.get(ContextKind::ValidValue)) {
        (Some(reason), _) => reason.to_string(),
        (None, Some(ContextValue::Strings(valid))) => format!("expected {}", valid.join(", ")),
        _ => "the value is not valid".into(),
    };
    let value = text(ContextKind::InvalidValue).unwrap_or_default();
    let shown = without_password(value);
    let former = former_names(command, flag);
    let set_variable = variables(flag, &former).into_iter().find(|name| is_set(name));
    if given(args).iter().any(|given| given == flag || former.contains(&given.as_str())) {
        let hides = shown != value;
        return hides.then(|| anyhow::anyhow!("--{flag} is {shown:?}: {reason}"));
    }
    Some(if let Some(variable) = set_variable {
        anyhow::anyhow!("the environment variable {variable} is {shown:?}: {reason}")
    } else {
        let file = config_path(args.iter().cloned())?;
        anyhow::anyhow!("settings file {}: {flag} is {shown:?}: {reason}", file.display())
    })
}

/// The settings of a service that differ from their defaults, for its log. Secrets are hidden.
pub(crate) fn effective(defaults: &Command, name: &str, matches: &ArgMatches) -> String {
    let Some(command) = defaults.find_subcommand(name) else { return String::new() };
    let mut settings = Vec::new();
    for arg in command.get_arguments() {
        let (Some(flag), Some(values)) =
            (arg.get_long(), matches.try_get_raw(arg.get_id().as_str()).ok().flatten())
        else {
            continue;
        };
        let values: Vec<_> = values.map(|value| value.to_string_lossy().into_owned()).collect();
        let is_off = matches!(arg.get_action(), ArgAction::SetTrue) && values == ["false"];
        let default = arg.get_default_values().iter().map(|value| value.to_string_lossy());
        if is_off || default.eq(values.iter().map(String::as_str)) {
            continue;
        }
        let value = without_password(&values.join(","));
        let value = if arg.is_hide_env_values_set() { "(hidden)" } else { &value };
        settings.push(format!("{flag}={value}"));
    }
    if let Some(config) = matches.try_get_raw("config").ok().flatten().into_iter().flatten().next()
    {
        settings.push(format!("config={}", config.to_string_lossy()));
    }
    match settings[..] {
        [] => "all settings have their defaults".into(),
        _ => format!("{}; other settings have their defaults", settings.join(" ")),
    }
}

/// Warns of `AFTERIMAGE_*` variables that are no setting, and of a settings file with a secret that
/// other users can read.
pub(crate) fn warn(command: &Command, args: &[OsString]) {
    for name in unknown_variables(command) {
        tracing::warn!("the environment variable {name} is not a setting; is it misspelt?");
    }
    if let Some(path) = config_path(args.iter().cloned())
        && has_secret(&path)
    {
        warn_if_exposed("--config", &path);
    }
}

/// Whether a settings file has a token or a URL with a password in it.
fn has_secret(path: &Path) -> bool {
    // A pipe gives its content once.
    let text = path.is_file().then(|| afterimage_core::file::read_text(path).ok()).flatten();
    let table = text.and_then(|text| text.parse::<toml::Table>().ok());
    let commands = table.iter().flatten().filter_map(|(_, table)| table.as_table());
    commands.flatten().any(|(name, value)| {
        name == "token" || value.as_str().is_some_and(|text| without_password(text) != text)
    })
}

/// The `AFTERIMAGE_*` variables that are no setting.
pub(crate) fn unknown_variables(command: &Command) -> Vec<String> {
    let mut known = BTreeSet::from([format!("{ENV_PREFIX}CONFIG")]);
    collect_variables(command, &mut known);
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| name.starts_with(ENV_PREFIX) && !known.contains(name)).collect()
}

fn collect_variables(command: &Command, known: &mut BTreeSet<String>) {
    for arg in command.get_arguments() {
        if let Some(name) = setting_name(arg) {
            known.extend(variables(&name, &aliases(arg)));
        }
    }
    command.get_subcommands().for_each(|sub| collect_variables(sub, known));
}

/// A text for messages: in a URL, the part before `@` may hold a password.
fn without_password(text: &str) -> String {
    let text = &without_secret_parameters(text);
    match text.rsplit_once('@') {
        Some((before, hosts)) if before.contains(':') => {
            let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
            let separator = if scheme.is_empty() { "" } else { "://" };
            format!("{scheme}{separator}…@{hosts}")
        }
        _ => text.clone(),
    }
}

/// Words in the names of URL parameters whose values are secret.
const SECRET_NAMES: [&str; 6] = ["pass", "pwd", "secret", "token", "auth", "key"];

/// The text with `…` for the values of secret parameters, as in `?password=…`.
fn without_secret_parameters(text: &str) -> String {
    let mut shown = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['?', '&']) {
        let (before, after) = rest.split_at(at + 1);
        shown += before;
        rest = after;
        let Some((name, value)) = after.split_once('=') else { continue };
        let lower = name.to_ascii_lowercase();
        let is_name = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        if is_name && SECRET_NAMES.iter().any(|word| lower.contains(word)) {
            let end = value.find(['&', '#', ' ', '\n', '"', '\'']).unwrap_or(value.len());
            shown.extend([name, "=…"]);
            rest = &value[end..];
        }
    }
    shown + rest
}

/// The text without the logins of this process's own arguments and variables, in any form, and
/// without those of other URLs.
pub(crate) fn without_secrets(text: &str) -> String {
    let arguments = std::env::args_os().skip(1);
    let variables = std::env::vars_os()
        .filter(|(name, _)| name.to_string_lossy().starts_with(ENV_PREFIX))
        .map(|(_, value)| value);
    let mut shown = text.to_owned();
    for value in arguments.chain(variables) {
        let value = value.to_string_lossy();
        let value = match value.strip_prefix("--").and_then(|flag| flag.split_once('=')) {
            Some((_, value)) => value,
            None => &value,
        };
        let safe = without_password(value);
        if safe != value {
            shown = shown.replace(value, &safe);
        }
    }
    without_logins(&shown)
}

/// The text with `…` for the login in each of its URLs.
pub(crate) fn without_logins(text: &str) -> String {
    let text = &without_secret_parameters(text);
    let mut shown = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("://") {
        let end = after.find([' ', '\n', '"', '\'']).unwrap_or(after.len());
        let (url, tail) = after.split_at(end);
        let hosts = url.rsplit_once('@').map(|(_, hosts)| format!("…@{hosts}"));
        shown.extend([before, "://", hosts.as_deref().unwrap_or(url)]);
        rest = tail;
    }
    shown + rest
}

/// The name of a flag that clap writes with its value: `--flag <VALUE>`.
fn flag_name(written: &str) -> Option<&str> {
    written.strip_prefix("--")?.split([' ', '=']).next()
}

/// The error of two settings that exclude each other, by the names under which they are set. `None`
/// when both are flags, which clap reports as well.
fn exclude_each_other(flags: [Option<&str>; 2], args: &[OsString]) -> Option<anyhow::Error> {
    let given = given(args);
    let is_given = |flag: &str| given.iter().any(|given| given == flag);
    let [one, other] = flags.map(|flag| {
        let flag = flag?;
        Some(if is_given(flag) { format!("--{flag}") } else { variable(flag) })
    });
    let (one, other) = (one?, other?);
    let from_environment = [&one, &other].iter().any(|name| name.starts_with(ENV_PREFIX));
    from_environment.then(|| both_set(&one, &other))
}

fn both_set(one: &str, other: &str) -> anyhow::Error {
    anyhow::anyhow!("{one} and {other} are both set: set one of them")
}

/// The environment variable of a flag.
fn variable(flag: &str) -> String {
    format!("{ENV_PREFIX}{}", flag.to_uppercase().replace('-', "_"))
}

/// The environment variables of a flag, under its present name and under its former ones.
fn variables(flag: &str, former: &[&str]) -> Vec<String> {
    [flag].iter().chain(former).map(|name| variable(name)).collect()
}

/// Whether an environment variable has a value. An empty one counts as not set.
fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// The former names of a flag, which clap accepts and does not show.
fn aliases(arg: &Arg) -> Vec<&str> {
    arg.get_all_aliases().unwrap_or_default()
}

/// The former names of the flag of this name in any command.
fn former_names<'a>(command: &'a Command, flag: &str) -> Vec<&'a str> {
    let mut found = command.get_arguments().filter(|arg| arg.get_long() == Some(flag));
    let nested = || command.get_subcommands().map(|sub| former_names(sub, flag));
    found
        .next()
        .map(aliases)
        .unwrap_or_else(|| nested().find(|names| !names.is_empty()).unwrap_or_default())
}

/// The file that `--config` names. Parsed by hand, since the file decides the flags' defaults.
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
    let variable = format!("{ENV_PREFIX}CONFIG");
    is_set(&variable).then(|| std::env::var_os(&variable).map(PathBuf::from))?
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
        let set = variables(&name, &aliases(&arg)).into_iter().find(|variable| is_set(variable));
        let arg = match set.filter(|_| !beaten.contains(&name)) {
            Some(variable) => arg.env(variable).hide_env(true),
            None => arg,
        };
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            return arg.value_parser(clap::builder::BoolishValueParser::new());
        }
        arg
    });
    names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, |sub| with_environment(sub, given))
    })
}

/// The settings that a flag on the command line excludes. The flag beats their environment
/// variables as it beats its own.
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
        if GLOBAL.contains(&&*name) {
            // All commands share it.
            command = with_table(command, &toml::Table::from_iter([(name, table)]))?;
            continue;
        }
        let toml::Value::Table(table) = table else {
            bail!("{name:?} is outside a table; put it under its command, for example [serve]");
        };
        if !command.get_subcommands().any(|sub| sub.get_name() == name) {
            let known: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
            bail!("there is no command [{name}]; the commands are {}", known.join(", "));
        }
        command = with_subcommand(command, &name, &table)?;
    }
    Ok(command)
}

/// Gives an existing subcommand the defaults of its table.
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
    refuse_conflicts(&command, table)?;
    let mut command = command;
    for (name, value) in table {
        let is_command = command.get_subcommands().any(|sub| sub.get_name() == name);
        if let (toml::Value::Table(table), true) = (value, is_command) {
            command = with_subcommand(command, name, table)?;
            continue;
        }
        let arg = command.get_arguments().find(|arg| has_name(arg, name));
        let Some(arg) = arg.filter(|arg| setting_name(arg).is_some()) else {
            if GLOBAL.contains(&&**name) {
                bail!("{name:?} applies to all commands; put it before the first table");
            }
            bail!("there is no setting {name:?}; the settings are {}", known.join(", "));
        };
        let values = match value {
            toml::Value::Array(values) => values.iter().map(text_of).collect(),
            value => text_of(value).map(|text| vec![text]),
        };
        let values: Vec<String> =
            values.with_context(|| format!("{name:?} must be a string, a number or a boolean"))?;
        let id = arg.get_id().to_string();
        // A flag that excludes this one beats the file, as this one's own flag does.
        let rivals = command.get_arg_conflicts_with(arg).into_iter();
        let rivals: Vec<String> = rivals.map(|rival| rival.get_id().to_string()).collect();
        command = command.mut_arg(id, |arg| {
            // Help must not show a secret.
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

/// The syntax error of a settings file, in one line with its place.
fn syntax_error(error: &toml::de::Error, text: &str) -> anyhow::Error {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    anyhow::anyhow!("TOML, line {line}: {}", error.message())
}

/// Refuses two settings of one table that exclude each other.
fn refuse_conflicts(command: &Command, table: &toml::Table) -> anyhow::Result<()> {
    let find = |name: &String| command.get_arguments().find(|arg| has_name(arg, name));
    for (name, arg) in table.keys().filter_map(|name| Some((name, find(name)?))) {
        let rivals = command.get_arg_conflicts_with(arg);
        let is_rival = |other: &&String| rivals.iter().any(|rival| has_name(rival, other));
        if let Some(other) = table.keys().find(is_rival) {
            return Err(both_set(name, other));
        }
    }
    Ok(())
}

/// Whether an argument has this long name, now or formerly.
fn has_name(arg: &Arg, name: &str) -> bool {
    arg.get_long() == Some(name) || aliases(arg).contains(&name)
}

/// The name under which an argument can be set: that of its long flag.
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
    fn an_unknown_setting_or_command_is_named() {
        let error = |file| format!("{:#}", listen(file, &["afterimage", "cache"]).unwrap_err());
        assert!(error("[cache]\nlisten-on = 1").contains("there is no setting \"listen-on\""));
        assert!(error("[cash]\nlisten = 1").contains("there is no command [cash]"));
        assert!(error("listen = 1").contains("outside a table"));
        assert!(error("[cache]\nlisten = {}").contains("must be a string"));
        assert!(error("[bench.find-max]\np98 = 1").contains("there is no setting \"p98\""));
        assert!(error("[cache").contains("TOML"));
    }

    #[test]
    fn booleans_and_wrong_values_go_through_the_flags_checks() {
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
