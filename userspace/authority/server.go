// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"time"

	"golang.org/x/net/netutil"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

// DefaultListen is where an authority listens by default.
const DefaultListen = ":15443"

// DefaultIntermediateTTL is the life of a node's intermediate.
const DefaultIntermediateTTL = time.Hour

// Bounds of the server.
const (
	maxConnections = 256
	maxBody        = 64 << 10
	maxHeader      = 8 << 10
	exchangeTime   = 15 * time.Second // reading a request and writing its answer
	ownLeafTTL     = time.Hour
	shutdownTime   = 5 * time.Second
)

// reservedPath begins the IDs that no node may issue.
const reservedPath = "/sallyport/"

// ServerID is the SPIFFE ID of a trust domain's authority.
func ServerID(trustDomain string) string {
	return "spiffe://" + trustDomain + reservedPath + "authority"
}

// Options configures an authority.
type Options struct {
	StateDir        string
	TrustDomain     string
	Listen          string // "": DefaultListen
	TPM             string // see identity.KeyOptions
	RequireTPM      bool
	SecretFile      string
	IntermediateTTL time.Duration // 0: DefaultIntermediateTTL; 4 s to 24 h
	Now             func() time.Time
	Log             *slog.Logger // nil discards
	Banner          io.Writer    // where the warning of a software key goes; nil discards
	Listener        net.Listener // instead of Listen; Run closes it
}

// Run serves until ctx ends.
func Run(ctx context.Context, o Options) error {
	s, err := newServer(o)
	if err != nil {
		return err
	}
	defer s.close()
	if text := s.ca.Banner(); text != "" && o.Banner != nil {
		fmt.Fprintln(o.Banner, text)
	}
	if _, err := s.leaves.Wait(ctx, ServerID(o.TrustDomain)); err != nil {
		return fmt.Errorf("start authority: %w", err)
	}
	return s.serve(ctx, o)
}

// CreateToken makes a join token for a node that may issue exactly ids. It
// makes the authority's root where there is none yet, and may be used while
// the server runs. The token's text is shown once and stored nowhere.
func CreateToken(o Options, node string, ids []string, ttl time.Duration) (token string, info TokenInfo, err error) {
	store, err := o.store()
	if err != nil {
		return "", TokenInfo{}, err
	}
	certs, err := identity.ReadCertificates(filepath.Join(o.StateDir, "authority.pem"))
	if err != nil {
		ca, err := o.openCA()
		if err != nil {
			return "", TokenInfo{}, err
		}
		defer ca.Close()
		root, err := x509.ParseCertificate(ca.Trust().Roots[0])
		if err != nil {
			return "", TokenInfo{}, fmt.Errorf("create join token: %w", err)
		}
		certs = []*x509.Certificate{root}
	}
	t := newToken(certs[0])
	if info, err = store.add(t, node, ids, ttl); err != nil {
		return "", TokenInfo{}, err
	}
	return t.Encode(), info, nil
}

func (o Options) store() (*Store, error) {
	store, err := OpenStore(o.StateDir, o.TrustDomain)
	if err == nil && o.Now != nil {
		store.now = o.Now
	}
	return store, err
}

func (o Options) openCA() (*identity.CA, error) {
	return identity.OpenCA(identity.CAOptions{
		StateDir: o.StateDir, TrustDomain: o.TrustDomain, Node: "authority", TPM: o.TPM, RequireTPM: o.RequireTPM,
		SecretFile: o.SecretFile, Authority: true, Now: o.Now, Log: o.Log,
	})
}

type server struct {
	o      Options
	ca     *identity.CA
	store  *Store
	leaves *identity.Leaves
	limit  *limiter
	now    func() time.Time
	log    *slog.Logger
}

func newServer(o Options) (*server, error) {
	if o.IntermediateTTL == 0 {
		o.IntermediateTTL = DefaultIntermediateTTL
	}
	if o.IntermediateTTL < 4*time.Second || o.IntermediateTTL > 24*time.Hour {
		return nil, fmt.Errorf("start authority: an intermediate's lifetime of %v is not between 4s and 24h", o.IntermediateTTL)
	}
	s := &server{o: o, now: o.Now, log: o.Log}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if s.store, err = o.store(); err != nil {
		return nil, err
	}
	if s.ca, err = o.openCA(); err != nil {
		return nil, err
	}
	s.limit = newLimiter(s.now())
	s.leaves = identity.NewLeaves(identity.LeavesOptions{Log: s.log, Sign: s.signOwn})
	if err := s.leaves.Set([]string{ServerID(o.TrustDomain)}); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *server) close() {
	s.leaves.Close()
	s.ca.Close()
}

// signOwn adds the root to the server's own chain, because a joining node
// knows only its hash.
func (s *server) signOwn(_ context.Context, id string, csr []byte) ([][]byte, error) {
	chain, err := s.ca.Sign(csr, id, ownLeafTTL)
	if err != nil {
		return nil, err
	}
	return append(chain, s.ca.Trust().Roots...), nil
}

func (s *server) serve(ctx context.Context, o Options) error {
	listener := o.Listener
	if listener == nil {
		address := o.Listen
		if address == "" {
			address = DefaultListen
		}
		var err error
		if listener, err = net.Listen("tcp", address); err != nil {
			return fmt.Errorf("start authority: %w", err)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/join", s.join)
	mux.HandleFunc("POST /v1/renew", s.renew)
	mux.HandleFunc("GET /v1/bundle", s.bundle)
	web := &http.Server{
		Handler:           s.limited(mux),
		ReadTimeout:       exchangeTime,
		ReadHeaderTimeout: exchangeTime,
		WriteTimeout:      exchangeTime,
		IdleTimeout:       exchangeTime,
		MaxHeaderBytes:    maxHeader,
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){}, // no HTTP/2
		ErrorLog:          log.New(io.Discard, "", 0),                               // strangers' handshakes are not worth a log line each
	}
	s.log.Info("authority listens", "address", listener.Addr().String(), "trustDomain", o.TrustDomain, "anchor", s.ca.Anchor().String())
	ended := make(chan error, 1)
	go func() {
		ended <- web.Serve(tls.NewListener(netutil.LimitListener(listener, maxConnections), s.tlsConfig()))
	}()
	select {
	case err := <-ended:
		return fmt.Errorf("serve authority: %w", err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
	defer cancel()
	if err := web.Shutdown(stop); err != nil {
		web.Close()
	}
	if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve authority: %w", err)
	}
	return nil
}

// tlsConfig asks for a client certificate, which only a renewal needs. It is
// a node's intermediate: the handshake proves possession of its key.
func (s *server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"http/1.1"},
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768, tls.CurveP256, tls.X25519},
		SessionTicketsDisabled: true, // no resumption: a node is looked at anew each time
		ClientAuth:             tls.RequestClientCert,
		Time:                   s.now,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			leaf, err := s.leaves.Get(ServerID(s.o.TrustDomain))
			if err != nil {
				return nil, err
			}
			return &leaf.Certificate, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			_, err := s.verifyNode(&cs)
			return err
		},
	}
}

func (s *server) verifyNode(cs *tls.ConnectionState) (identity.Scope, error) {
	if len(cs.PeerCertificates) == 0 {
		return identity.Scope{}, &identity.Refusal{Reason: flow.ReasonCertMissing, Detail: "no client certificate; present the node's current intermediate"}
	}
	if len(cs.PeerCertificates) > 1 {
		return identity.Scope{}, &identity.Refusal{Reason: flow.ReasonCertChainSize, Detail: "more than the node's intermediate was presented"}
	}
	var roots []*x509.Certificate
	for _, der := range s.ca.Trust().Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return identity.Scope{}, err
		}
		roots = append(roots, root)
	}
	return identity.VerifyNode(cs.PeerCertificates[0], roots, s.now())
}

// The bodies on the wire; []byte is base64.
type (
	joinRequest struct {
		Token string `json:"token"`
		CSR   []byte `json:"csr"`
	}
	renewRequest struct {
		CSR []byte `json:"csr"`
	}
	answer struct {
		TrustDomain  string   `json:"trustDomain"`
		Intermediate []byte   `json:"intermediate,omitempty"`
		Roots        [][]byte `json:"roots"`
	}
	refusalAnswer struct {
		Error  string      `json:"error"`
		Reason flow.Reason `json:"reason"`
	}
)

func (s *server) join(w http.ResponseWriter, r *http.Request) {
	var body joinRequest
	if err := readBody(w, r, &body); err != nil {
		s.refuse(w, r, "", err)
		return
	}
	token, err := ParseToken(body.Token)
	if err != nil {
		s.refuse(w, r, "", refuseToken("not one"))
		return
	}
	request, err := identity.ParseRequest(body.CSR)
	if err != nil {
		s.refuse(w, r, token.ID(), err)
		return
	}
	key := keyHash(request.RawSubjectPublicKeyInfo)
	scope, err := s.store.claim(token, key)
	if err != nil {
		s.refuse(w, r, token.ID(), err)
		return
	}
	s.issue(w, r, body.CSR, key, scope, "join")
}

func (s *server) renew(w http.ResponseWriter, r *http.Request) {
	held, err := s.verifyNode(r.TLS)
	if err != nil {
		s.refuse(w, r, "", err)
		return
	}
	var body renewRequest
	if err := readBody(w, r, &body); err != nil {
		s.refuse(w, r, held.Node, err)
		return
	}
	request, err := identity.ParseRequest(body.CSR)
	if err != nil {
		s.refuse(w, r, held.Node, err)
		return
	}
	key := keyHash(r.TLS.PeerCertificates[0].RawSubjectPublicKeyInfo)
	if keyHash(request.RawSubjectPublicKeyInfo) != key {
		s.refuse(w, r, held.Node, &identity.Refusal{Reason: flow.ReasonCertKeyUnproven, Detail: "the request is over another key than the intermediate"})
		return
	}
	scope, err := s.store.renewScope(held.Node, key)
	if err != nil {
		s.refuse(w, r, held.Node, err)
		return
	}
	s.issue(w, r, body.CSR, key, scope, "renew")
}

func (s *server) issue(w http.ResponseWriter, r *http.Request, csr []byte, key string, scope identity.Scope, what string) {
	der, err := s.ca.Issue(csr, scope, s.o.IntermediateTTL)
	if err != nil {
		s.refuse(w, r, scope.Node, err)
		return
	}
	cert, err := x509.ParseCertificate(der)
	if err == nil {
		err = s.store.issued(scope.Node, key, identity.Serial(cert.SerialNumber))
	}
	if err != nil {
		s.refuse(w, r, scope.Node, err)
		return
	}
	s.log.Info("issued intermediate", "node", scope.Node, "by", what, "ids", len(scope.IDs),
		"serial", identity.Serial(cert.SerialNumber), "until", cert.NotAfter, "client", r.RemoteAddr)
	trust := s.ca.Trust()
	reply(w, http.StatusOK, answer{TrustDomain: trust.Name, Intermediate: der, Roots: trust.Roots})
}

func (s *server) bundle(w http.ResponseWriter, _ *http.Request) {
	trust := s.ca.Trust()
	reply(w, http.StatusOK, answer{TrustDomain: trust.Name, Roots: trust.Roots})
}

// limited puts the rate limits before every request.
func (s *server) limited(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil || !s.limit.allow(peer.Addr(), s.now()) {
			w.Header().Set("Retry-After", "10")
			reply(w, http.StatusTooManyRequests, refusalAnswer{Error: "too many requests; try again later", Reason: flow.ReasonThrottled})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// refuse answers with the reason. What went wrong inside stays in the log;
// so does which of its faults a join token has.
func (s *server) refuse(w http.ResponseWriter, r *http.Request, who string, err error) {
	var refusal *identity.Refusal
	if !errors.As(err, &refusal) {
		s.log.Error("answer enrolment", "path", r.URL.Path, "who", who, "client", r.RemoteAddr, "error", err)
		reply(w, http.StatusServiceUnavailable, refusalAnswer{Error: "the authority cannot answer at the moment", Reason: flow.ReasonInternal})
		return
	}
	s.log.Warn("refused enrolment", "path", r.URL.Path, "who", who, "client", r.RemoteAddr, "reason", string(refusal.Reason), "detail", refusal.Detail)
	status, text := http.StatusForbidden, refusal.Detail
	switch refusal.Reason {
	case flow.ReasonEnrolmentToken:
		text = "the join token is not valid: unknown, used, expired or revoked"
	case flow.ReasonMalformed, flow.ReasonCertMalformed:
		status = http.StatusBadRequest
	}
	reply(w, status, refusalAnswer{Error: text, Reason: refusal.Reason})
}

func readBody(w http.ResponseWriter, r *http.Request, into any) error {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil {
		err = decodeStrict(b, into)
	}
	if err != nil {
		return &identity.Refusal{Reason: flow.ReasonMalformed, Detail: "the body is not the JSON that is expected here"}
	}
	return nil
}

func reply(w http.ResponseWriter, status int, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		status, b = http.StatusInternalServerError, nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(b) // the client is gone if this fails
}

func keyHash(spki []byte) string {
	hash := sha256.Sum256(spki)
	return hex.EncodeToString(hash[:])
}
