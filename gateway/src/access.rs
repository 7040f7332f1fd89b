//! Which clients may do what: bearer tokens with a scope each.

use std::fmt;
use std::sync::Arc;

use afterimage_wire::server::Token;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use crate::Shared;
use crate::problem::Problem;

/// What a token allows. A higher scope includes the lower ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Statistics, the model, metrics.
    Read,
    /// Also answers.
    Infer,
    /// Also flush and forget.
    Admin,
}

/// Tokens and their scopes.
#[derive(Clone, Default)]
pub struct Access {
    /// Empty if there is none: then each client has `open`.
    tokens: Vec<(Token, Scope)>,
    open: Option<Scope>,
}

impl Access {
    /// The same with `scope` for each client without a token.
    #[must_use]
    pub fn open_to(mut self, scope: Scope) -> Self {
        self.open = Some(scope);
        self
    }

    /// Whether each client may use the model, without a token.
    pub fn is_open(&self) -> bool {
        self.scope(None) >= Some(Scope::Infer)
    }

    /// The same with a token that allows `scope`.
    #[must_use]
    pub fn token(mut self, token: Token, scope: Scope) -> Self {
        self.tokens.push((token, scope));
        self
    }

    /// The tokens, to load them again.
    pub fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.tokens.iter().map(|(token, _)| token)
    }

    /// The scope of a client that shows `token`; `None` if it is wrong or missing.
    fn scope(&self, token: Option<&[u8]>) -> Option<Scope> {
        if self.tokens.is_empty() {
            return Some(self.open.unwrap_or(Scope::Admin));
        }
        let Some(shown) = token else { return self.open };
        // All are compared always, so that the time does not depend on which one is right.
        let scopes = self.tokens.iter().map(|(token, scope)| (token.matches(shown), *scope));
        let found = scopes.fold(
            None,
            |found, (equal, scope)| {
                if equal { found.max(Some(scope)) } else { found }
            },
        );
        found.or(self.open)
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scopes: Vec<_> = self.tokens.iter().map(|(_, scope)| scope).collect();
        f.debug_struct("Access").field("tokens", &scopes).field("open", &self.open).finish()
    }
}

/// The scope that a request needs.
fn needed(method: &Method, path: &str) -> Scope {
    match path {
        "/v1/classify" => Scope::Infer,
        path if path.starts_with("/v1/memory") => Scope::Admin,
        _ if method == Method::GET || method == Method::HEAD => Scope::Read,
        _ => Scope::Admin,
    }
}

/// Refuses requests whose token does not allow them.
pub(crate) async fn check(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let shown = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    // The scheme is case-insensitive (RFC 9110, section 11.1).
    let token = shown.and_then(|value| {
        let (scheme, token) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
    });
    let needed = needed(request.method(), request.uri().path());
    match shared.options.access.scope(token) {
        Some(scope) if scope >= needed => Ok(next.run(request).await),
        Some(_) => Err(Problem::new(
            StatusCode::FORBIDDEN,
            "unauthorized",
            format!("this token does not allow {} {}", request.method(), request.uri().path()),
        )),
        None => Err(Problem::new(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Token {
        Token::new(text).unwrap()
    }

    #[test]
    fn the_highest_scope_of_a_token_counts() {
        let access =
            Access::default().token(token("a"), Scope::Read).token(token("a"), Scope::Admin);
        assert_eq!(access.scope(Some(b"a")), Some(Scope::Admin));
        assert_eq!(access.scope(Some(b"b")), None);
        assert_eq!(access.scope(None), None);
    }

    #[test]
    fn an_open_gateway_limits_strangers_to_its_scope() {
        let access = Access::default().open_to(Scope::Infer);
        assert_eq!(access.scope(None), Some(Scope::Infer));
        assert_eq!(access.scope(Some(b"anything")), Some(Scope::Infer));
        assert_eq!(Access::default().scope(None), Some(Scope::Admin));
    }

    #[test]
    fn each_route_needs_a_scope() {
        assert_eq!(needed(&Method::GET, "/v1/stats"), Scope::Read);
        assert_eq!(needed(&Method::POST, "/v1/classify"), Scope::Infer);
        assert_eq!(needed(&Method::DELETE, "/v1/memory"), Scope::Admin);
        assert_eq!(needed(&Method::POST, "/v1/memory/forget"), Scope::Admin);
        assert_eq!(needed(&Method::POST, "/v1/a-later-route"), Scope::Admin);
    }
}
