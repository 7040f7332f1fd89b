//! Which clients may do what: bearer tokens with a scope each.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use afterimage_core::{ClientId, Tenant};
use afterimage_http::Peer;
use afterimage_wire::server::{Tenants, Token};
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
    /// Their tokens allow [`Scope::Infer`].
    tenants: Option<Tenants>,
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
        self.admit(None).is_some_and(|(scope, _)| scope >= Scope::Infer)
    }

    /// The same with a token that allows `scope`.
    #[must_use]
    pub fn token(mut self, token: Token, scope: Scope) -> Self {
        self.tokens.push((token, scope));
        self
    }

    /// The same with tenants, whose tokens allow [`Scope::Infer`].
    #[must_use]
    pub fn tenants(mut self, tenants: Tenants) -> Self {
        self.tenants = Some(tenants);
        self
    }

    /// The tenants, to load them again.
    pub fn own_tenants(&self) -> impl Iterator<Item = &Tenants> {
        self.tenants.iter()
    }

    /// The tokens, to load them again.
    pub fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.tokens.iter().map(|(token, _)| token)
    }

    /// The scope and the tenant of a client that shows `token`; `None` if it is wrong or missing.
    fn admit(&self, token: Option<&[u8]>) -> Option<(Scope, Tenant)> {
        let alone = |scope| (scope, Tenant::default());
        if self.tokens.is_empty() && self.tenants.is_none() {
            return Some(alone(self.open.unwrap_or(Scope::Admin)));
        }
        let Some(shown) = token else { return self.open.map(alone) };
        let tenant = self.tenants.as_ref().and_then(|tenants| tenants.of(shown));
        // All are compared always, so that the time does not depend on which one is right.
        let scopes = self.tokens.iter().map(|(token, scope)| (token.matches(shown), *scope));
        let found = scopes.fold(
            None,
            |found, (equal, scope)| {
                if equal { found.max(Some(scope)) } else { found }
            },
        );
        let tenant = tenant.map(|tenant| (Scope::Infer, tenant));
        found.map(alone).or(tenant).or(self.open.map(alone))
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
        path if path.starts_with("/v2/models/") && path.ends_with("/infer") => Scope::Infer,
        path if path.starts_with("/v1/memory") => Scope::Admin,
        _ if method == Method::GET || method == Method::HEAD => Scope::Read,
        _ => Scope::Admin,
    }
}

/// Refuses requests whose token does not allow them.
pub(crate) async fn check(
    State(shared): State<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let shown = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    // The scheme is case-insensitive (RFC 9110, section 11.1).
    let token = shown.and_then(|value| {
        let (scheme, token) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
    });
    let needed = needed(request.method(), request.uri().path());
    match shared.options.access.admit(token) {
        Some((scope, tenant)) if scope >= needed => {
            let peer = request.extensions().get::<Peer>().map(|peer| peer.address.ip());
            let client = client_of(peer, tenant);
            request.extensions_mut().insert(client);
            Ok(next.run(request).await)
        }
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

/// The client of a request, for fair queues: its address within its tenant.
fn client_of(address: Option<IpAddr>, tenant: Tenant) -> ClientId {
    let mut hasher = DefaultHasher::new();
    address.hash(&mut hasher);
    ClientId { tenant, number: hasher.finish() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Token {
        Token::new(text).unwrap()
    }

    fn scope(access: &Access, token: Option<&[u8]>) -> Option<Scope> {
        access.admit(token).map(|(scope, _)| scope)
    }

    #[test]
    fn a_tenant_may_ask_the_model_and_counts_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tenants");
        std::fs::write(&file, "search secret 7").unwrap();
        let access = Access::default().tenants(Tenants::read(file).unwrap());
        let (scope, tenant) = access.admit(Some(b"secret")).unwrap();
        assert_eq!((scope, tenant.weight), (Scope::Infer, 7));
        assert!(access.admit(None).is_none() && access.admit(Some(b"other")).is_none());
        let of = |last| client_of(Some([192, 0, 2, last].into()), tenant);
        assert!(of(1) == of(1) && of(1) != of(2));
    }

    #[test]
    fn the_highest_scope_of_a_token_counts() {
        let access =
            Access::default().token(token("a"), Scope::Read).token(token("a"), Scope::Admin);
        assert_eq!(scope(&access, Some(b"a")), Some(Scope::Admin));
        assert_eq!(scope(&access, Some(b"b")), None);
        assert_eq!(scope(&access, None), None);
    }

    #[test]
    fn an_open_gateway_limits_strangers_to_its_scope() {
        let access = Access::default().open_to(Scope::Infer);
        assert_eq!(scope(&access, None), Some(Scope::Infer));
        assert_eq!(scope(&access, Some(b"anything")), Some(Scope::Infer));
        assert_eq!(scope(&Access::default(), None), Some(Scope::Admin));
    }

    #[test]
    fn each_route_needs_a_scope() {
        assert_eq!(needed(&Method::GET, "/v1/stats"), Scope::Read);
        assert_eq!(needed(&Method::POST, "/v1/classify"), Scope::Infer);
        assert_eq!(needed(&Method::POST, "/v2/models/classifier/infer"), Scope::Infer);
        assert_eq!(needed(&Method::GET, "/v2/models/classifier"), Scope::Read);
        assert_eq!(needed(&Method::DELETE, "/v1/memory"), Scope::Admin);
        assert_eq!(needed(&Method::POST, "/v1/memory/forget"), Scope::Admin);
        assert_eq!(needed(&Method::POST, "/v1/a-later-route"), Scope::Admin);
    }
}
