// SPDX-License-Identifier: Apache-2.0

package token

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// MaxToken is the longest token that is read, in bytes.
const MaxToken = 16 << 10

// maxIssuers bounds how many issuers a Verifier holds.
const maxIssuers = 1024

// Binding says how a rule wants a token bound to its sender.
type Binding uint8

// The bindings. Whatever a rule asks for, a token that is bound is never
// taken without its proof.
const (
	BindingNone      Binding = iota
	BindingMTLS              // RFC 8705: the caller's certificate
	BindingDPoP              // RFC 9449: a key, by a proof with each request
	BindingSignature         // RFC 9421: a key, which signs each request
)

// Issuer is what is pinned of a token issuer.
type Issuer struct {
	Name       string   // namespace/name of the TokenIssuer
	URL        string   // the iss claim, compared byte by byte
	Algorithms []string // of RFC 7518 and RFC 8037; empty: ES256
	// Audiences are those that this issuer may speak for; empty: any that a
	// rule asks for.
	Audiences []string
	// Types are the accepted typ values; empty: at+jwt (RFC 9068).
	Types []string
	// MaxLifetime bounds exp - iat; 0: 15 minutes.
	MaxLifetime time.Duration
	// Require are claims that each token must have.
	Require []Requirement
	// RequireBinding refuses this issuer's unbound tokens whatever the rule says.
	RequireBinding bool
	// Introspect says that the issuer is asked about tokens that are no JWTs
	// (RFC 7662), NoKeys that it is asked about all.
	Introspect, NoKeys bool
}

// Requirement is a claim that must be there with one of some values: a string
// that is one of them, or an array that holds one.
type Requirement struct {
	Claim  string
	Values []string
}

func (r Requirement) same(o Requirement) bool {
	return r.Claim == o.Claim && slices.Equal(r.Values, o.Values)
}

// Options are what a Verifier needs from outside.
type Options struct {
	// Refresh asks for an issuer's keys, by the TokenIssuer's name. It must
	// not block. It is called at most once per issuer and RefreshInterval.
	Refresh func(issuer string)
	// Introspect asks an issuer, by the TokenIssuer's name, about a token, and
	// returns its answer (RFC 7662 section 2.2). Nil: none can be asked.
	Introspect func(ctx context.Context, issuer, token string) ([]byte, error)
	// CacheEntries and CacheBytes bound the cache; 0: 32768 and 64 MiB.
	CacheEntries int
	CacheBytes   int64
	Proofs       *Proofs          // that were used; nil: none before
	Log          *slog.Logger     // nil: none
	Now          func() time.Time // nil: time.Now
}

// RefreshInterval is the least time between two requests for an issuer's keys.
const RefreshInterval = 10 * time.Second

// Verifier verifies tokens. All its methods are safe for concurrent use;
// Verify never blocks and takes no lock that all requests share.
type Verifier struct {
	opt     Options
	log     *slog.Logger
	cache   cache
	issuers atomic.Pointer[map[string]*issuer]
	revoked atomic.Pointer[revocations]
	proofs  atomic.Pointer[Proofs]
	mu      sync.Mutex // of those who set issuers and keys
}

// issuer is an Issuer in use. One whose settings change is another issuer,
// so a pointer to it is the generation that cached tokens are held against.
type issuer struct {
	Issuer
	rsa       string // the algorithm of an RSA key whose JWK names none
	keys      atomic.Pointer[keySet]
	problem   atomic.Pointer[string] // why there is no newer key set, nil if there is none
	refreshes atomic.Uint64
	questions questions

	mu      sync.Mutex
	asked   time.Time     // when keys were last asked for
	waiting chan struct{} // closed when the request for keys is answered; nil if there is none
}

// New returns a Verifier without issuers.
func New(opt Options) *Verifier {
	if opt.Refresh == nil {
		opt.Refresh = func(string) {}
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	v := &Verifier{opt: opt, log: opt.Log}
	if opt.Proofs == nil {
		opt.Proofs = NewProofs()
	}
	v.proofs.Store(opt.Proofs)
	if v.log == nil {
		v.log = slog.New(slog.DiscardHandler)
	}
	v.cache.init(opt.CacheEntries, opt.CacheBytes)
	v.issuers.Store(&map[string]*issuer{})
	v.revoked.Store(&revocations{})
	return v
}

// SetProofs has used proofs be remembered there from now on; what the ones
// before knew is not taken over.
func (v *Verifier) SetProofs(p *Proofs) { v.proofs.Store(p) }

// Proofs returns where used proofs are remembered.
func (v *Verifier) Proofs() *Proofs { return v.proofs.Load() }

// SetIssuers replaces all issuers at once, or none where it returns an error.
// An issuer whose URL is unchanged keeps its keys; one that is unchanged in
// everything keeps its cached tokens too.
func (v *Verifier) SetIssuers(list []Issuer) error {
	if len(list) > maxIssuers {
		return fmt.Errorf("set token issuers: %d are more than %d", len(list), maxIssuers)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	old, next := *v.issuers.Load(), make(map[string]*issuer, len(list))
	for i := range list {
		name := list[i].Name
		if next[name] != nil {
			return fmt.Errorf("set token issuers: two are named %q", name)
		}
		made, err := newIssuer(list[i], old[name])
		if err != nil {
			return fmt.Errorf("set token issuer %q: %w", name, err)
		}
		next[name] = made
	}
	v.issuers.Store(&next)
	for name, i := range old {
		if next[name] != i {
			i.answered()
		}
	}
	return nil
}

// SetIssuer adds an issuer or replaces the one of its name.
func (v *Verifier) SetIssuer(one Issuer) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	old := *v.issuers.Load()
	made, err := newIssuer(one, old[one.Name])
	if err != nil {
		return fmt.Errorf("set token issuer %q: %w", one.Name, err)
	}
	if old[one.Name] == nil && len(old) >= maxIssuers {
		return fmt.Errorf("set token issuer %q: there are %d already", one.Name, maxIssuers)
	}
	next := make(map[string]*issuer, len(old)+1)
	maps.Copy(next, old)
	next[one.Name] = made
	v.issuers.Store(&next)
	if replaced := old[one.Name]; replaced != nil && replaced != made {
		replaced.answered()
	}
	return nil
}

func newIssuer(cfg Issuer, old *issuer) (*issuer, error) {
	if u, err := url.Parse(cfg.URL); err != nil || u.Scheme == "" || len(cfg.URL) > 512 {
		return nil, errors.New("its issuer is not a URL")
	}
	if cfg.MaxLifetime == 0 {
		cfg.MaxLifetime = defaultLife
	}
	if cfg.MaxLifetime < 0 || cfg.MaxLifetime > maxLifetime {
		return nil, fmt.Errorf("maxLifetime is not between 0 and %v", maxLifetime)
	}
	if len(cfg.Algorithms) == 0 {
		cfg.Algorithms = []string{"ES256"}
	}
	if len(cfg.Types) == 0 {
		cfg.Types = []string{"at+jwt"}
	}
	i := &issuer{Issuer: cfg}
	i.questions.asking, i.questions.refused, i.questions.askers = map[[sha256.Size]byte]*question{}, map[[sha256.Size]byte]refusal{}, map[string]*asker{}
	for _, name := range cfg.Algorithms {
		a := algorithms[name]
		if a == nil {
			return nil, fmt.Errorf("algorithm %q is not one of ES256, ES384, ES512, EdDSA, RS256, RS384, RS512, PS256, PS384, PS512", name)
		}
		if a.family == familyRSA && i.rsa == "" {
			i.rsa = name
		}
	}
	i.Types = make([]string, len(cfg.Types))
	for n, t := range cfg.Types {
		i.Types[n] = mediaType(t)
	}
	if old == nil || old.URL != cfg.URL {
		return i, nil
	}
	if old.same(&i.Issuer) {
		return old, nil
	}
	i.keys.Store(old.keys.Load())
	i.problem.Store(old.problem.Load())
	i.refreshes.Store(old.refreshes.Load())
	old.mu.Lock()
	i.asked = old.asked
	old.mu.Unlock()
	return i, nil
}

func (i *issuer) same(b *Issuer) bool {
	a := &i.Issuer
	if a.MaxLifetime != b.MaxLifetime || a.RequireBinding != b.RequireBinding || a.Introspect != b.Introspect || a.NoKeys != b.NoKeys || !slices.EqualFunc(a.Require, b.Require, Requirement.same) {
		return false
	}
	equal := func(x, y []string) bool { return strings.Join(x, "\x00") == strings.Join(y, "\x00") }
	return equal(a.Algorithms, b.Algorithms) && equal(a.Audiences, b.Audiences) && equal(a.Types, b.Types)
}

// mediaType is a typ value in the form that is compared: RFC 7515 section
// 4.1.9 lets "application/" be left out and case vary.
func mediaType(typ string) string {
	return strings.TrimPrefix(strings.ToLower(typ), "application/")
}

// SetKeys hands over an issuer's JWKS document and when it was fetched. A
// document that is refused leaves the old keys in place. The same document
// again only renews their age.
func (v *Verifier) SetKeys(name string, document []byte, fetched time.Time) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	i := (*v.issuers.Load())[name]
	if i == nil {
		return fmt.Errorf("set keys of token issuer %q: there is none of that name", name)
	}
	defer i.answered()
	if now := v.opt.Now(); fetched.After(now) {
		fetched = now
	}
	set, err := parseKeySet(document)
	if err != nil {
		err = fmt.Errorf("set keys of token issuer %q: %w", name, err)
		why := err.Error()
		i.problem.Store(&why)
		v.log.Warn("token keys refused, the old ones stay", "issuer", name, "error", err)
		return err
	}
	i.problem.Store(nil)
	if old := i.keys.Load(); old != nil && old.document == set.document {
		old.fetched.Store(fetched.UnixNano())
		return nil
	}
	set.fetched.Store(fetched.UnixNano())
	i.keys.Store(set)
	return nil
}

// KeysFailed says that an issuer's keys could not be had. Those that are
// there serve until MaxKeyAge.
func (v *Verifier) KeysFailed(name, why string) {
	if i := (*v.issuers.Load())[name]; i != nil {
		if i.problem.Swap(&why) == nil {
			v.log.Warn("token keys not refreshed, the old ones serve until they are too old", "issuer", name, "limit", MaxKeyAge, "error", why)
		}
		i.answered()
	}
}

// IssuerStatus is what status shows of an issuer.
type IssuerStatus struct {
	Name, URL string
	Keys      int       // 0: none were ever had
	Fetched   time.Time // zero: never
	Stale     bool      // past MaxKeyAge: its tokens are refused
	Problem   string    // why there is no newer key set, "" if there is no problem
	Refreshes uint64    // how often unknown kids made us ask for keys
}

// Status returns one entry an issuer, in no order.
func (v *Verifier) Status(now time.Time) []IssuerStatus {
	all := *v.issuers.Load()
	out := make([]IssuerStatus, 0, len(all))
	for _, i := range all {
		s := IssuerStatus{Name: i.Name, URL: i.URL, Refreshes: i.refreshes.Load()}
		if why := i.problem.Load(); why != nil {
			s.Problem = *why
		}
		if k := i.keys.Load(); k != nil {
			s.Keys = max(len(k.byID), 1)
			s.Fetched = time.Unix(0, k.fetched.Load())
			s.Stale = now.Sub(s.Fetched) > MaxKeyAge
		}
		out = append(out, s)
	}
	return out
}

// Check is what a rule and a connection ask of a token.
type Check struct {
	Issuer   string // namespace/name of the TokenIssuer
	Audience string // "": one of the issuer's own
	Scopes   []string
	// ACR are the authentication context classes of which the token must show
	// one, MaxAge is how long ago its subject may have authenticated (RFC
	// 9470); nil and 0: neither is asked for.
	ACR     []string
	MaxAge  time.Duration
	BoundTo Binding
	// Thumbprints are the SHA-256 digests of the certificates that prove a
	// bound token on this connection (flow.Peer.Thumbprints).
	Thumbprints [][sha256.Size]byte
	// DPoP says that the token came with the scheme DPoP, and Proof is what
	// proves a token that is bound to a key; nil proves nothing.
	DPoP  bool
	Proof *Proof
	Now   time.Time // zero: the verifier's own clock

	raw     []byte  // the token
	given   *Claims // what Introspect was answered
	refused error   // why it could not ask
}

// Verify judges a token. It returns the claims and flow.ReasonOK, or nil, why
// it is refused, and an error with the detail for operators, which never
// holds the token. An error that is ErrKeysPending may be tried again after
// Await. A hit of the cache allocates nothing.
func (v *Verifier) Verify(raw []byte, c *Check) (*Claims, flow.Reason, error) {
	if len(raw) == 0 {
		return nil, flow.ReasonTokenMissing, errMissing
	}
	if len(raw) > MaxToken {
		return nil, flow.ReasonTokenTooLarge, errTooLarge
	}
	i := (*v.issuers.Load())[c.Issuer]
	if i == nil {
		return nil, flow.ReasonTokenIssuer, errNoIssuer
	}
	now := c.Now
	if now.IsZero() {
		now = v.opt.Now()
	}
	keys := i.keys.Load()
	c.raw = raw
	sum := sha256.Sum256(raw)
	opaque := i.opaque(raw)
	if opaque {
		keys = &i.questions.marker
	}
	claims := v.cache.get(&sum, i, keys)
	known := claims != nil
	switch {
	case !opaque:
	case known && now.Before(claims.until):
	case c.given != nil:
		claims, known = c.given, true
	case c.refused != nil:
		return nil, flow.ReasonTokenUnavailable, c.refused
	default:
		reason, err := i.questions.refusal(&sum, now)
		return nil, reason, err
	}
	if !known {
		var reason flow.Reason
		var err error
		if claims, reason, err = v.authenticate(string(raw), i, keys, now); err != nil {
			return nil, reason, err
		}
	}
	if reason, err := v.judge(claims, i, keys, c, now); err != nil {
		return nil, reason, err
	}
	if !known {
		v.cache.put(&sum, i, keys, claims, len(raw))
	}
	return claims, flow.ReasonOK, nil
}

// authenticate does what depends on the token's bytes and the key set alone.
func (v *Verifier) authenticate(raw string, i *issuer, keys *keySet, now time.Time) (*Claims, flow.Reason, error) {
	t, reason, err := scan(raw)
	if err != nil {
		return nil, reason, err
	}
	if t.issuer != i.URL {
		return nil, flow.ReasonTokenIssuer, errIssuer
	}
	alg := algorithms[t.algorithm]
	if alg == nil || !slices.Contains(i.Algorithms, t.algorithm) {
		return nil, flow.ReasonTokenAlgorithm, errAlgorithm
	}
	k, reason, err := v.key(i, keys, t.keyID, now)
	if err != nil {
		return nil, reason, err
	}
	own := k.algorithm
	if own == "" {
		own = i.rsa
	}
	if own != t.algorithm || alg.family != k.family {
		return nil, flow.ReasonTokenAlgorithm, errKeyAlgorithm
	}
	size := alg.signature
	if size == 0 {
		size = k.size
	}
	if len(t.signature) != size || alg.method.Verify(t.signed, t.signature, k.public) != nil {
		return nil, flow.ReasonTokenSignature, errSignature
	}
	claims, err := readClaims(t.claims)
	if err != nil {
		return nil, flow.ReasonTokenClaims, err
	}
	claims.kind = t.typ
	return claims, flow.ReasonOK, nil
}
