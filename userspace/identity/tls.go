// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"container/list"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// ReasonOf returns why a handshake was refused: the reason of a *Refusal of
// ours, or what crypto/tls found before it asked us.
func ReasonOf(err error) (reason flow.Reason, detail string) {
	var refusal *Refusal
	switch {
	case err == nil:
		return flow.ReasonOK, ""
	case errors.As(err, &refusal):
		return refusal.Reason, refusal.Detail
	case strings.Contains(err.Error(), "unsupported versions"):
		return flow.ReasonTLSVersion, err.Error()
	}
	return flow.ReasonTLSHandshake, err.Error()
}

// Curves are the key exchanges: the hybrid post-quantum one costs a sixth of
// a full handshake, P-256 is for peers without it.
var curves = []tls.CurveID{tls.X25519MLKEM768, tls.CurveP256, tls.X25519}

// TicketLife bounds the life of a session ticket key. Tickets also end with
// the client's chain and with every change of trust or revocations.
const ticketLife = time.Hour

// sessionMargin is what a chain must still live for its session to be
// resumed: one that ended between offer and check would lose the connection.
const sessionMargin = time.Second

// ServerOptions configures the accepting side.
type ServerOptions struct {
	Leaves   *Leaves
	Verifier *Verifier
	// Identity names the identity whose leaf a client gets. Nil goes by
	// ServerName, which our clients send.
	Identity func(*tls.ClientHelloInfo) (id string, err error)
	// Certificate shows another certificate than an identity's leaf. Nil: the
	// leaf of Identity.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// Expect says whether the client may be that identity. Nil: any.
	Expect func(id string) bool
	// NextProtos are the ALPN protocols, one of which must be agreed on; ""
	// among them lets in who offers none. Nil: "h2".
	NextProtos []string
	// Anonymous lets clients without a certificate in; PeerOf then says
	// ReasonCertMissing.
	Anonymous bool
	// Unproven lets also those in whose certificate proves nothing; PeerOf then
	// says why.
	Unproven bool
}

// ServerConfig returns a TLS 1.3 configuration that asks for a client
// certificate and verifies it by Verifier in every handshake, resumed ones
// included. Leaves, trust and revocations may change while it is in use.
func ServerConfig(o ServerOptions) *tls.Config {
	if o.NextProtos == nil {
		o.NextProtos = []string{"h2"}
	}
	s := &server{ServerOptions: o}
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         o.NextProtos,
		GetCertificate:     s.certificate,
		GetConfigForClient: s.config,
	}
}

type server struct {
	ServerOptions
	state atomic.Pointer[serverState]
	mu    sync.Mutex // one rebuild of state at a time
}

// serverState is a configuration and what its session tickets rest on.
type serverState struct {
	config      *tls.Config
	bundle      *Bundle
	revocations *Revocations
	until       time.Time
}

func (s *server) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if s.Certificate != nil {
		return s.Certificate(hello)
	}
	var leaf *Leaf
	var err error
	if s.Identity == nil {
		leaf, err = s.Leaves.ByServerName(hello.ServerName)
	} else {
		var id string
		if id, err = s.Identity(hello); err == nil {
			leaf, err = s.Leaves.Get(id)
		}
	}
	if err != nil {
		return nil, err
	}
	return &leaf.Certificate, nil
}

// config returns the configuration of the moment, with fresh ticket keys
// after trust or revocations changed.
func (s *server) config(*tls.ClientHelloInfo) (*tls.Config, error) {
	if st := s.state.Load(); st != nil && s.fresh(st) {
		return st.config, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.state.Load(); st != nil && s.fresh(st) {
		return st.config, nil
	}
	st := &serverState{
		bundle: s.Verifier.bundle.Load(), revocations: s.Verifier.revocations.Load(), until: s.Verifier.now().Add(ticketLife),
	}
	var ticketKey [32]byte
	rand.Read(ticketKey[:]) // never fails, by its contract
	c := &tls.Config{
		MinVersion:       tls.VersionTLS13,
		NextProtos:       s.NextProtos,
		CurvePreferences: curves,
		GetCertificate:   s.certificate,
		ClientAuth:       tls.RequestClientCert, // VerifyConnection refuses the lack of one, with a reason
		VerifyConnection: s.verify,
		Time:             s.Verifier.now,
		// The peers are proxies, not browsers: full records cost least.
		DynamicRecordSizingDisabled: true,
	}
	c.SetSessionTicketKeys([][32]byte{ticketKey})
	c.WrapSession = func(cs tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
		session.Extra = append(session.Extra, chainEnd(cs.PeerCertificates))
		return c.EncryptTicket(cs, session)
	}
	c.UnwrapSession = func(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
		session, err := c.DecryptTicket(ticket, cs)
		if err != nil || session == nil || !resumable(session, s.Verifier.now()) {
			return nil, err
		}
		return session, nil
	}
	st.config = c
	s.state.Store(st)
	return c, nil
}

func (s *server) fresh(st *serverState) bool {
	return st.bundle == s.Verifier.bundle.Load() && st.revocations == s.Verifier.revocations.Load() && s.Verifier.now().Before(st.until)
}

func (s *server) verify(cs tls.ConnectionState) error {
	if err := checkProtocol(cs, s.NextProtos); err != nil {
		return err
	}
	if s.Unproven || s.Anonymous && len(cs.PeerCertificates) == 0 {
		return nil
	}
	return verifyConnection(s.Verifier, cs, RoleClient, s.Expect)
}

func verifyConnection(v *Verifier, cs tls.ConnectionState, role Role, expect func(string) bool) error {
	peer, err := v.PeerOf(cs, role)
	if err != nil {
		return err
	}
	if expect != nil && !expect(peer.ID) {
		return refuse(flow.ReasonPeerMismatch, "the %s is %s, which is not expected here", role, peer.ID)
	}
	return nil
}

func checkProtocol(cs tls.ConnectionState, protocols []string) error {
	if !slices.Contains(protocols, cs.NegotiatedProtocol) {
		return refuse(flow.ReasonTLSHandshake, "no common application protocol: the peer must offer %s", strings.Join(protocols, ", "))
	}
	return nil
}

// PeerOf verifies the peer of a connection as of now. After a handshake with
// a configuration of this package it only recalls who that was.
func (v *Verifier) PeerOf(cs tls.ConnectionState, role Role) (Peer, error) {
	if cs.Version < tls.VersionTLS13 {
		return Peer{}, refuse(flow.ReasonTLSVersion, "%s; at least TLS 1.3 is needed", tls.VersionName(cs.Version))
	}
	return v.Verify(cs.PeerCertificates, role, v.now())
}

// extraMark begins the entry of ours in a session's extra data; what follows
// is the end of the peer's chain in Unix seconds, big endian.
const extraMark = "sallyport chain end 1:"

func chainEnd(chain []*x509.Certificate) []byte {
	var end uint64
	for i, c := range chain {
		if t := uint64(max(c.NotAfter.Unix(), 0)); i == 0 || t < end {
			end = t
		}
	}
	return binary.BigEndian.AppendUint64([]byte(extraMark), end)
}

// resumable says whether the session's peer can still be verified when the
// handshake is done. Otherwise a full handshake is better than a refusal.
func resumable(session *tls.SessionState, now time.Time) bool {
	for _, extra := range session.Extra {
		if end, ok := strings.CutPrefix(string(extra), extraMark); ok && len(end) == 8 {
			return now.Add(sessionMargin).Before(time.Unix(int64(binary.BigEndian.Uint64([]byte(end))), 0))
		}
	}
	return false
}

// ClientOptions configures one connection of the connecting side.
type ClientOptions struct {
	Leaves   *Leaves
	Verifier *Verifier
	ID       string // the identity to connect as
	// Peer is the identity that is asked for by ServerName. It may be ""
	// where the server has only one.
	Peer string
	// Expect says whether the server may be that identity. Nil: only Peer.
	Expect     func(id string) bool
	NextProtos []string  // nil: "h2"
	Sessions   *Sessions // nil: no resumption
}

// ClientConfig returns the TLS 1.3 configuration of one connection. The
// server is verified by Verifier in every handshake, resumed ones included.
// It fails where ID has no valid leaf.
func ClientConfig(o ClientOptions) (*tls.Config, error) {
	if _, err := o.Leaves.Get(o.ID); err != nil {
		return nil, err
	}
	if o.NextProtos == nil {
		o.NextProtos = []string{"h2"}
	}
	if o.Expect == nil {
		peer := o.Peer
		o.Expect = func(id string) bool { return id == peer }
	}
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         o.NextProtos,
		CurvePreferences:   curves,
		InsecureSkipVerify: true, // the name is a SPIFFE ID: VerifyConnection does it all
		Time:               o.Verifier.now,
	}
	if o.Peer != "" {
		c.ServerName = ServerName(o.Peer)
	}
	var slot *sessionSlot
	if o.Sessions != nil && o.Peer != "" {
		slot = &sessionSlot{ClientOptions: o, basis: sessionBasis{
			bundle: o.Verifier.bundle.Load(), revocations: o.Verifier.revocations.Load(),
		}}
		c.ClientSessionCache = slot
	}
	// The leaf is asked for when it is needed: dialling may have taken longer
	// than the one of before lived.
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		leaf, err := o.Leaves.Get(o.ID)
		if err != nil {
			return nil, err
		}
		if slot != nil {
			slot.basis.leaf = leaf.Thumbprint
		}
		return &leaf.Certificate, nil
	}
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := checkProtocol(cs, o.NextProtos); err != nil {
			return err
		}
		if slot != nil {
			slot.end = chainEnd(cs.PeerCertificates)
		}
		return verifyConnection(o.Verifier, cs, RoleServer, o.Expect)
	}
	return c, nil
}

// Sessions holds TLS sessions by (own identity, peer identity), so that no
// session is ever shared between identities. A session is forgotten when the
// own leaf, the trust bundle or the deny list is replaced, and when the
// server's chain is about to end. It is safe for concurrent use.
type Sessions struct {
	mu    sync.Mutex // held for a map look-up, never across a handshake
	limit int
	items map[sessionKey]*list.Element
	order *list.List // of *sessionItem, the latest used first
}

type sessionKey struct{ id, peer string }

// sessionBasis is what a session rests on besides the peer's chain.
type sessionBasis struct {
	leaf        [32]byte
	bundle      *Bundle
	revocations *Revocations
}

type sessionItem struct {
	key   sessionKey
	basis sessionBasis
	state *tls.ClientSessionState
}

// NewSessions returns a store of at most limit sessions, the least recently
// used of which makes room.
func NewSessions(limit int) *Sessions {
	return &Sessions{limit: limit, items: make(map[sessionKey]*list.Element), order: list.New()}
}

// sessionSlot is one connection's view of the store; the handshake and the
// reads of that connection use it one after the other.
type sessionSlot struct {
	ClientOptions
	basis sessionBasis
	end   []byte // set in the handshake, read when a ticket comes
}

// Get implements tls.ClientSessionCache.
func (s *sessionSlot) Get(string) (*tls.ClientSessionState, bool) {
	leaf, err := s.Leaves.Get(s.ID)
	if err != nil {
		return nil, false
	}
	s.basis.leaf = leaf.Thumbprint
	s.Sessions.mu.Lock()
	defer s.Sessions.mu.Unlock()
	e := s.Sessions.items[sessionKey{s.ID, s.Peer}]
	if e == nil {
		return nil, false
	}
	item := e.Value.(*sessionItem)
	_, session, err := item.state.ResumptionState()
	if err != nil || item.basis != s.basis || !resumable(session, s.Verifier.now()) {
		s.Sessions.remove(e)
		return nil, false
	}
	s.Sessions.order.MoveToFront(e)
	return item.state, true
}

// Put implements tls.ClientSessionCache; nil forgets the session.
func (s *sessionSlot) Put(_ string, state *tls.ClientSessionState) {
	if state != nil {
		_, session, err := state.ResumptionState()
		if err != nil {
			return
		}
		session.Extra = append(session.Extra, s.end)
	}
	key := sessionKey{s.ID, s.Peer}
	s.Sessions.mu.Lock()
	defer s.Sessions.mu.Unlock()
	if e := s.Sessions.items[key]; e != nil {
		s.Sessions.remove(e)
	}
	if state == nil || s.Sessions.limit <= 0 {
		return
	}
	if s.Sessions.order.Len() >= s.Sessions.limit {
		s.Sessions.remove(s.Sessions.order.Back())
	}
	s.Sessions.items[key] = s.Sessions.order.PushFront(&sessionItem{key: key, basis: s.basis, state: state})
}

func (s *Sessions) remove(e *list.Element) {
	s.order.Remove(e)
	delete(s.items, e.Value.(*sessionItem).key)
}
