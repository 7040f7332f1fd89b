//! The replies of Redis and memcached, cut out of the stream in place.
//!
//! The most frequent reply of each protocol is recognised by its first bytes; the others take a
//! slower path.

use afterimage_wire::Status;

use super::{Dialect, KEY_TEXT_LEN};

/// The longest accepted line of a reply. Error texts of Redis are the longest, and far shorter.
const MAX_LINE: usize = 2048;

/// One reply, or the part of one that concerns one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply<'a> {
    /// The value of the next key.
    Value(i64),
    /// The value of this key; the keys before it in the command have none.
    ValueOf([u8; KEY_TEXT_LEN], i64),
    /// The next key has no value.
    Miss,
    /// This number of values or misses follows.
    Many(u64),
    /// There are no more values for this command.
    End,
    /// A write or a fence has been carried out.
    Done,
    /// A command was not carried out.
    Failed(&'a [u8]),
}

/// A reply and its length; `None` for an incomplete reply; an error for an invalid one.
pub(crate) type Cut<'a> = Result<Option<(Reply<'a>, usize)>, String>;

/// The first reply in `input`.
#[inline]
pub(crate) fn cut(dialect: Dialect, input: &[u8]) -> Cut<'_> {
    match dialect {
        Dialect::Redis => redis(input),
        Dialect::MemcachedMeta => meta(input),
        _ => text(input),
    }
}

/// RESP: `$8\r\n<value>\r\n`, `$-1\r\n`, `*3\r\n`, `+OK\r\n`, `-ERR …\r\n`.
#[inline]
fn redis(input: &[u8]) -> Cut<'_> {
    if let Some((&[b'$', b'8', b'\r', b'\n', value @ .., b'\r', b'\n'], _)) =
        input.split_first_chunk::<14>()
    {
        return Ok(Some((Reply::Value(number(&value)), 14)));
    }
    redis_rare(input)
}

#[inline(never)]
fn redis_rare(input: &[u8]) -> Cut<'_> {
    let Some((line, len)) = line(input)? else { return Ok(None) };
    let reply = match line {
        b"$8" if input.len() < 14 => return Ok(None),
        b"$-1" => Reply::Miss,
        b"+OK" | b"+PONG" => Reply::Done,
        [b'-', text @ ..] => Reply::Failed(text),
        [b'*', digits @ ..] => match decimal(digits) {
            Some(count) => Reply::Many(count),
            None => return Err(senseless(line)),
        },
        _ => return Err(senseless(line)),
    };
    Ok(Some((reply, len)))
}

/// The text protocol: `VALUE <key> 0 8\r\n<value>\r\n`, `END\r\n`, `STORED\r\n`, `SERVER_ERROR
/// …\r\n`.
#[inline]
fn text(input: &[u8]) -> Cut<'_> {
    const VALUE: &[u8] = b"VALUE ";
    const KEY_END: usize = VALUE.len() + KEY_TEXT_LEN;
    const FLAGS_AND_LEN: &[u8] = b" 0 8\r\n";
    const VALUE_AT: usize = KEY_END + FLAGS_AND_LEN.len();
    const LEN: usize = VALUE_AT + 10;
    if let Some((item, _)) = input.split_first_chunk::<LEN>()
        && let Some((key, rest)) = item[VALUE.len()..].split_first_chunk()
        && let Some((value, b"\r\n")) = item[VALUE_AT..].split_first_chunk()
        && item.starts_with(VALUE)
        && rest.starts_with(FLAGS_AND_LEN)
    {
        return Ok(Some((Reply::ValueOf(*key, number(value)), LEN)));
    }
    if input.starts_with(b"END\r\n") {
        return Ok(Some((Reply::End, 5)));
    }
    match line(input)? {
        Some((line, _)) if line.starts_with(VALUE) && input.len() < LEN => Ok(None),
        found => memcached_rare(found),
    }
}

/// The meta protocol: `VA 8\r\n<value>\r\n`, `EN\r\n`, `HD\r\n`, `MN\r\n`, `SERVER_ERROR …\r\n`.
#[inline]
fn meta(input: &[u8]) -> Cut<'_> {
    if let Some((&[b'V', b'A', b' ', b'8', b'\r', b'\n', value @ .., b'\r', b'\n'], _)) =
        input.split_first_chunk::<16>()
    {
        return Ok(Some((Reply::Value(number(&value)), 16)));
    }
    match line(input)? {
        Some((b"VA 8", _)) if input.len() < 16 => Ok(None),
        Some((b"EN", len)) => Ok(Some((Reply::Miss, len))),
        found => memcached_rare(found),
    }
}

#[inline(never)]
fn memcached_rare(found: Option<(&[u8], usize)>) -> Cut<'_> {
    let Some((line, len)) = found else { return Ok(None) };
    let reply = match line {
        b"STORED" | b"HD" | b"MN" => Reply::Done,
        b"ERROR" | b"NOT_STORED" | b"NS" => Reply::Failed(line),
        _ if line.starts_with(b"SERVER_ERROR") || line.starts_with(b"CLIENT_ERROR") => {
            Reply::Failed(line)
        }
        _ => return Err(senseless(line)),
    };
    Ok(Some((reply, len)))
}

/// The status that is nearest to an error text; these protocols have no error numbers.
pub(crate) fn status(text: &[u8]) -> Status {
    let begins = |word: &str| text.starts_with(word.as_bytes());
    if begins("NOAUTH") || begins("WRONGPASS") {
        Status::Unauthenticated
    } else if ["OOM", "BUSY", "LOADING", "SERVER_ERROR out of memory"].into_iter().any(begins) {
        Status::Overloaded
    } else {
        Status::UpstreamError
    }
}

/// The first line without its end, and its length with it.
fn line(input: &[u8]) -> Result<Option<(&[u8], usize)>, String> {
    let searched = &input[..input.len().min(MAX_LINE)];
    match searched.iter().position(|&byte| byte == b'\n') {
        Some(end) => match searched[..end].strip_suffix(b"\r") {
            Some(line) => Ok(Some((line, end + 1))),
            None => Err(senseless(&searched[..end])),
        },
        None if searched.len() < MAX_LINE => Ok(None),
        None => Err(senseless(searched)),
    }
}

#[inline]
fn number(value: &[u8; 8]) -> i64 {
    i64::from_le_bytes(*value)
}

fn decimal(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cold]
fn senseless(line: &[u8]) -> String {
    let start = &line[..line.len().min(60)];
    format!("invalid reply \"{}\"", start.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REDIS: &[u8] = b"$8\r\n\r\n345678\r\n$-1\r\n*2\r\n+OK\r\n+PONG\r\n-ERR no such thing\r\n";
    const TEXT: &[u8] = b"VALUE AAAAAAAAAAB 0 8\r\n\r\n345678\r\nEND\r\nSTORED\r\nMN\r\nERROR\r\n";
    const META: &[u8] = b"VA 8\r\n\r\n345678\r\nEN\r\nHD\r\nMN\r\nSERVER_ERROR out of memory\r\n";

    fn all(dialect: Dialect, mut input: &[u8]) -> Vec<Reply<'_>> {
        let mut found = Vec::new();
        while let Some((reply, len)) = cut(dialect, input).unwrap() {
            found.push(reply);
            input = &input[len..];
        }
        found
    }

    #[test]
    fn splits_replies_whose_values_contain_line_ends() {
        let value = i64::from_le_bytes(*b"\r\n345678");
        assert_eq!(
            all(Dialect::Redis, REDIS),
            [
                Reply::Value(value),
                Reply::Miss,
                Reply::Many(2),
                Reply::Done,
                Reply::Done,
                Reply::Failed(b"ERR no such thing"),
            ]
        );
        assert_eq!(
            all(Dialect::Memcached, TEXT),
            [
                Reply::ValueOf(*b"AAAAAAAAAAB", value),
                Reply::End,
                Reply::Done,
                Reply::Done,
                Reply::Failed(b"ERROR"),
            ]
        );
        assert_eq!(
            all(Dialect::MemcachedMeta, META),
            [
                Reply::Value(value),
                Reply::Miss,
                Reply::Done,
                Reply::Done,
                Reply::Failed(b"SERVER_ERROR out of memory"),
            ]
        );
    }

    #[test]
    fn a_part_of_a_reply_waits_for_the_rest_wherever_it_is_cut() {
        for (dialect, stream) in
            [(Dialect::Redis, REDIS), (Dialect::Memcached, TEXT), (Dialect::MemcachedMeta, META)]
        {
            let whole = all(dialect, stream);
            let mut ends = vec![0];
            while let Some((_, len)) = cut(dialect, &stream[ends[ends.len() - 1]..]).unwrap() {
                ends.push(ends[ends.len() - 1] + len);
            }
            assert_eq!(ends.last(), Some(&stream.len()));
            for at in 0..stream.len() {
                let complete = ends.iter().filter(|&&end| end <= at).count() - 1;
                assert_eq!(all(dialect, &stream[..at]), whole[..complete], "{dialect} at {at}");
            }
        }
    }

    #[test]
    fn what_is_no_reply_is_said_to_be_none() {
        for (dialect, nonsense) in [
            (Dialect::Redis, &b"$5\r\nhello\r\n"[..]),
            (Dialect::Redis, b"*x\r\n"),
            (Dialect::Redis, b"+OK\n"),
            (Dialect::Redis, b"HTTP/1.1 400 Bad Request\r\n"),
            (Dialect::Redis, b"$8\r\n0123456789\r\n"),
            (Dialect::Memcached, b"VALUE short 0 8\r\n01234567\r\n-----------------\r\n"),
            (Dialect::Memcached, b"VALUE AAAAAAAAAAB 0 9\r\n012345678\r\n"),
            (Dialect::Memcached, b"EN\r\n"),
            (Dialect::MemcachedMeta, b"VA 9\r\n012345678\r\n"),
            (Dialect::MemcachedMeta, b"END\r\n"),
            (Dialect::Memcached, &[b'x'; MAX_LINE]),
        ] {
            let shown = nonsense.escape_ascii();
            assert!(cut(dialect, nonsense).is_err(), "{dialect}: {shown}");
        }
    }
}
