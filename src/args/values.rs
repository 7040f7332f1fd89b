//! What stands behind a flag: places, sizes, times and shares, as people write them.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use anyhow::bail;

/// Where something is: in this process, at an address, or in Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Embedded,
    At(String),
    /// A Redis or Valkey server, or a cluster of them.
    Redis(String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "embedded" {
            return Ok(Place::Embedded);
        }
        let redis = ["redis://", "redis+cluster://", "rediss://", "rediss+cluster://"];
        if redis.iter().any(|scheme| text.starts_with(scheme)) {
            return Ok(Place::Redis(text.to_owned()));
        }
        if text.contains("://") {
            return Err("expected host:port, redis:// or redis+cluster:// (with TLS rediss)".into());
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Place::At(text.to_owned()))
            }
            _ => Err("expected \"embedded\" or host:port".into()),
        }
    }
}

/// One in so many: `1/1000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share(pub(crate) NonZeroU32);

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one_in = text.strip_prefix("1/").and_then(|many| many.parse().ok());
        one_in.map(Share).ok_or_else(|| "expected 1/N, 1/1000 say".into())
    }
}

/// A number of bytes: `64KiB`, `256MiB`, `2GB`, `1000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl Size {
    pub(super) fn within(self, name: &str, limit: u32) -> anyhow::Result<u32> {
        match u32::try_from(self.0) {
            Ok(size) if size <= limit => Ok(size),
            _ => bail!("{name} is {self}; the limit is {}", Size(limit.into())),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<bytesize::ByteSize>().map(|size| Size(size.as_u64()))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", bytesize::ByteSize(self.0).display().iec())
    }
}

/// No time that makes sense here is longer.
const MAX_TIME: Duration = Duration::from_secs(366 * 24 * 3600);

/// A length of time above zero, for what would otherwise be over before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse()? {
            Time(Duration::ZERO) => Err("it must be more than nothing".into()),
            Time(time) => Ok(Span(time)),
        }
    }
}

/// A length of time: `200us`, `2ms`, `5s`, `1m 30s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Time(pub(crate) Duration);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
        if time > MAX_TIME {
            return Err("more than a year".into());
        }
        Ok(Time(time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_read_as_people_write_them() {
        assert_eq!("256MiB".parse(), Ok(Size(256 << 20)));
        assert_eq!("1000".parse(), Ok(Size(1000)));
        assert_eq!("200us".parse::<Time>().unwrap().0, Duration::from_micros(200));
        assert!("".parse::<Size>().is_err() && "2 parsecs".parse::<Time>().is_err());
        assert!("300000000000y".parse::<Time>().is_err() && "0s".parse::<Span>().is_err());
        let error = Size(5 << 30).within("--max-body", 1 << 30).unwrap_err();
        assert_eq!(error.to_string(), "--max-body is 5.0 GiB; the limit is 1.0 GiB");
    }

    #[test]
    fn a_share_is_one_in_so_many() {
        assert_eq!("1/1000".parse(), Ok(Share(NonZeroU32::new(1000).unwrap())));
        for wrong in ["", "1", "2/3", "1/0", "1/x", "0.1", "1/-1"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_place_is_embedded_or_an_address() {
        assert_eq!("embedded".parse(), Ok(Place::Embedded));
        assert_eq!("[::1]:7401".parse(), Ok(Place::At("[::1]:7401".into())));
        for wrong in
            ["redisss://h:1", "http://h:1", "", "here", ":7401", "localhost", "localhost:port"]
        {
            assert!(wrong.parse::<Place>().is_err(), "{wrong:?}");
        }
    }
}
