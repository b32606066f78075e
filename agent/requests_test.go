// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/appcerts"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/revocations"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

func slice(a string) []byte { return netip.MustParseAddr(a).AsSlice() }

// forApplication is a dial that is as it should be.
func (g *ground) forApplication() *linepb.Dial {
	return &linepb.Dial{
		Kind: linepb.DialKind_APPLICATION, NetnsCookie: g.near.Cookie, Address: serverAt.Addr().AsSlice(), Port: uint32(serverAt.Port()),
		ClientAddress: clientIP.AsSlice(), ClientPort: 40000, SourceIdentity: g.number("client"), TargetIdentity: g.number("server"),
	}
}

func listen(t *testing.T, a *testenv.Actor, at netip.AddrPort) *testenv.Sock {
	t.Helper()
	l, err := a.Listen(at)
	must(t, err)
	return l
}

// Every dial that the plan does not need is refused, says why, and is counted.
func TestDialIsHeldAgainstThePlan(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	listen(t, g.server, serverAt)
	application := func(change func(*linepb.Dial)) *linepb.Dial {
		d := g.forApplication()
		change(d)
		return d
	}
	other := func(kind linepb.DialKind, source, to string, port uint32) *linepb.Dial {
		return &linepb.Dial{Kind: kind, NetnsCookie: g.near.Cookie, Address: slice(to), Port: port, SourceIdentity: g.number(source)}
	}
	peer, plain := linepb.DialKind_PEER, linepb.DialKind_PLAIN
	for _, c := range []struct {
		name string
		dial *linepb.Dial
		want flow.Reason
		why  string
	}{
		{"a port that is not protected", application(func(d *linepb.Dial) { d.Port = 22 }), flow.ReasonLineRefused, "not a port of identity"},
		{"another identity's port", application(func(d *linepb.Dial) { d.TargetIdentity = g.number("far") }), flow.ReasonLineRefused, "not a port of identity"},
		{"no target", application(func(d *linepb.Dial) { d.TargetIdentity = 0 }), flow.ReasonLineRefused, "not a port of identity"},
		{"a namespace not ours", application(func(d *linepb.Dial) { d.NetnsCookie = 1 << 60 }), flow.ReasonLineRefused, "not one of ours"},
		{"a namespace of ours where it does not serve", application(func(d *linepb.Dial) { d.NetnsCookie = g.other.Cookie }), flow.ReasonLineRefused, "not a port of identity"},
		{"an address of another namespace", application(func(d *linepb.Dial) { d.Address = slice("192.0.2.20") }), flow.ReasonLineRefused, "not an address of that namespace"},
		{"somebody else's address", application(func(d *linepb.Dial) { d.Address = slice("198.51.100.7") }), flow.ReasonLineRefused, "not an address of that namespace"},
		{"an address of 5 bytes", application(func(d *linepb.Dial) { d.Address = d.Address[:3] }), flow.ReasonLineRefused, "not an address"},
		{"a port over 65535", application(func(d *linepb.Dial) { d.Port += 1 << 16 }), flow.ReasonLineRefused, "not an address"},
		{"a number nobody has", application(func(d *linepb.Dial) { d.SourceIdentity = 1 << 30 }), flow.ReasonLineRefused, "no identity of this node"},
		{"a caller of another node by its number", application(func(d *linepb.Dial) { d.SourceIdentity = g.number("far") }), flow.ReasonLineRefused, "no identity of this node"},
		{"a caller who may not call", application(func(d *linepb.Dial) { d.SourceIdentity = g.number("stranger") }), flow.ReasonLineRefused, "may not call"},
		{"a caller past its validity", application(func(d *linepb.Dial) { d.SourceIdentity = g.number("lapsed") }), flow.ReasonIdentityExpired, "expired at"},
		{"no client", application(func(d *linepb.Dial) { d.ClientAddress = nil }), flow.ReasonLineRefused, "no client address"},
		{"client port 0", application(func(d *linepb.Dial) { d.ClientPort = 0 }), flow.ReasonLineRefused, "no client address"},
		{"client port over 65535", application(func(d *linepb.Dial) { d.ClientPort = 1 << 16 }), flow.ReasonLineRefused, "no client address"},
		{"nothing of the server listens", application(func(d *linepb.Dial) { d.Port = uint32(webAt.Port()) }), flow.ReasonUpstreamGone, "nothing of"},
		{"unknown kind", application(func(d *linepb.Dial) { d.Kind = 99 }), flow.ReasonLineRefused, "unknown kind"},
		{"no kind", application(func(d *linepb.Dial) { d.Kind = 0 }), flow.ReasonLineRefused, "unknown kind"},

		{"peer: for nobody", &linepb.Dial{Kind: peer, NetnsCookie: g.near.Cookie, Address: slice("198.51.100.7")}, flow.ReasonLineRefused, "does not live in that namespace"},
		{"peer: from where the caller does not live", other(peer, "stranger", "198.51.100.7", 0), flow.ReasonLineRefused, "does not live in that namespace"},
		{"peer: a host that nobody serves at", other(peer, "client", "198.51.100.8", 0), flow.ReasonLineRefused, "serves there"},
		{"peer: a host whose server it may not call", other(peer, "server", "198.51.100.7", 0), flow.ReasonLineRefused, "serves there"},
		{"peer: past its validity", other(peer, "lapsed", "198.51.100.7", 0), flow.ReasonIdentityExpired, "expired at"},
		{"peer: the audited, a host nobody serves at", other(peer, "soft", "198.51.100.8", 0), flow.ReasonLineRefused, "serves there"},

		{"plain: while enforced", other(plain, "client", "198.51.100.8", 443), flow.ReasonLineRefused, "is enforced"},
		{"plain: within egress, another port", other(plain, "client", "203.0.113.9", 80), flow.ReasonLineRefused, "is enforced"},
		{"plain: an address that is claimed", other(plain, "client", "198.51.100.7", 9000), flow.ReasonLineRefused, "is enforced"},
		{"plain: for nobody", &linepb.Dial{Kind: plain, NetnsCookie: g.near.Cookie, Address: slice("203.0.113.9"), Port: 443}, flow.ReasonLineRefused, "does not live in that namespace"},
		{"plain: from where the caller does not live", other(plain, "stranger", "203.0.113.9", 443), flow.ReasonLineRefused, "does not live in that namespace"},
	} {
		before := g.refusals("dial")
		reason, why, fd := h.dial(c.dial)
		if reason != c.want || !strings.Contains(why, c.why) {
			t.Errorf("%s: %q (%s), want %q (%s)", c.name, reason, why, c.want, c.why)
		}
		if fd >= 0 {
			unix.Close(fd)
		}
		counted := 0.0
		if c.want == flow.ReasonLineRefused {
			counted = 1
		}
		if n := g.refusals("dial") - before; n != counted {
			t.Errorf("%s: counted %v times, want %v", c.name, n, counted)
		}
	}
}

// What the plan needs is dialled: the server sees the true client, and a dial
// for another node goes to the tunnel's port whatever was asked for.
func TestDialIsMade(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	l := listen(t, g.server, serverAt)
	reason, why, fd := h.dial(g.forApplication())
	if reason != flow.ReasonOK {
		t.Fatalf("%s: %s", reason, why)
	}
	defer unix.Close(fd)
	s, from, err := l.Accept()
	must(t, err)
	if want := netip.AddrPortFrom(clientIP, 40000); from != want {
		t.Errorf("the server saw %s, want %s", from, want)
	}
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if b, err := s.Recv(1); err != nil || string(b) != "x" {
		t.Errorf("the server read %q, %v", b, err)
	}
	for _, c := range []struct {
		name string
		dial *linepb.Dial
		want netip.AddrPort
	}{
		{"peer", &linepb.Dial{Kind: linepb.DialKind_PEER, NetnsCookie: g.near.Cookie, Address: slice("192.0.2.10"), Port: 22, SourceIdentity: g.number("client")},
			netip.AddrPortFrom(serverAt.Addr(), 15008)},
		{"plain, for who is only audited", &linepb.Dial{Kind: linepb.DialKind_PLAIN, NetnsCookie: g.near.Cookie, Address: slice("192.0.2.20"), Port: 7,
			SourceIdentity: g.number("soft")}, netip.MustParseAddrPort("192.0.2.20:7")},
	} {
		reason, why, fd := h.dial(c.dial)
		if reason != flow.ReasonOK {
			t.Errorf("%s: %s: %s", c.name, reason, why)
			continue
		}
		to, err := unix.Getpeername(fd)
		if sa, ok := to.(*unix.SockaddrInet4); err == nil && (!ok || netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)) != c.want) {
			t.Errorf("%s: to %+v, want %s", c.name, to, c.want)
		}
		unix.Close(fd)
	}
}

func request(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(t, err)
	return csr
}

func TestSignIsHeldAgainstThePlan(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	csr := request(t)
	if chain, why := h.sign(g.spiffe("client"), csr); why != "" || len(chain) == 0 {
		t.Fatalf("an identity of this node: %d certificates, %s", len(chain), why)
	} else if leaf, err := x509.ParseCertificate(chain[0]); err != nil || len(leaf.URIs) != 1 || leaf.URIs[0].String() != g.spiffe("client") {
		t.Errorf("the leaf: %v, %v", leaf, err)
	}
	if _, err := g.revoked.Revoke(revocations.Identity, g.spiffe("stranger"), 0, "", ""); err != nil {
		t.Fatal(err)
	}
	here := g.spiffe("client")
	if !strings.Contains(here, "/node/"+nodeName+"/") {
		t.Fatalf("the ID %s names no node", here)
	}
	for _, c := range []struct{ name, id, why string }{
		{"of another node", strings.Replace(here, "/node/"+nodeName+"/", "/node/there/", 1), "no identity of this node"},
		{"known, and lives elsewhere", g.spiffe("far"), "no identity of this node"},
		{"unknown", "spiffe://" + trustDomain + "/node/" + nodeName + "/nobody", "no identity of this node"},
		{"of another trust domain", strings.Replace(here, trustDomain, "evil.example", 1), "no identity of this node"},
		{"another spelling", strings.ToUpper(here[:9]) + here[9:], "no identity of this node"},
		{"no name", "", "no identity of this node"},
		{"revoked", g.spiffe("stranger"), "is revoked"},
		{"past its validity", g.spiffe("lapsed"), "has expired"},
	} {
		before := g.refusals("sign")
		if chain, why := h.sign(c.id, csr); len(chain) != 0 || !strings.Contains(why, c.why) {
			t.Errorf("%s (%s): %d certificates, %q, want %q", c.name, c.id, len(chain), why, c.why)
		}
		if n := g.refusals("sign") - before; n != 1 {
			t.Errorf("%s: counted %v times", c.name, n)
		}
	}
	for name, bad := range map[string][]byte{"no request": nil, "rubbish": []byte("rubbish"), "a cut one": csr[:len(csr)-1]} {
		if chain, why := h.sign(here, bad); len(chain) != 0 || why == "" {
			t.Errorf("%s: %d certificates", name, len(chain))
		}
	}
}

// What an application's key signs is a server's handshake, for a policy that
// is in force here, and nothing else.
func TestAppSignIsHeldAgainstThePlan(t *testing.T) {
	g := newGround(t)
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"app.example"}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	cert, private := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	must(t, os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(t, os.WriteFile(private, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
	g.appcerts.Set([]appcerts.Source{{API: "t/api", Certificate: cert, Key: private}})
	h := g.connect(nil).ready()
	g.appcerts.Set([]appcerts.Source{{API: "t/api", Certificate: cert, Key: private}}) // the plan's own are none
	handshake := append(append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...), make([]byte, 32)...)
	ask := func(api string, message []byte, hash uint32) *linepb.AppSignReply {
		t.Helper()
		m, _ := h.ask(&linepb.Message{Body: &linepb.Message_AppSign{AppSign: &linepb.AppSign{Api: api, Message: message, Hash: hash}}})
		return m.GetAppSignReply()
	}
	if r := ask("t/api", handshake, uint32(crypto.SHA256)); r.GetError() != "" || len(r.GetSignature()) == 0 {
		t.Errorf("a handshake: %v", r)
	}
	for name, c := range map[string]struct {
		api     string
		message []byte
		hash    uint32
	}{
		"another policy":       {"t/other", handshake, uint32(crypto.SHA256)},
		"no policy":            {"", handshake, uint32(crypto.SHA256)},
		"a client's handshake": {"t/api", bytes.Replace(handshake, []byte("server"), []byte("client"), 1), uint32(crypto.SHA256)},
		"a certificate":        {"t/api", der, uint32(crypto.SHA256)},
		"nothing":              {"t/api", nil, uint32(crypto.SHA256)},
		"a digest":             {"t/api", handshake, 0},
		"a hash that is none":  {"t/api", handshake, 1 << 31},
	} {
		before := g.refusals("sign")
		if r := ask(c.api, c.message, c.hash); r.GetError() == "" || len(r.GetSignature()) != 0 {
			t.Errorf("%s: %v", name, r)
		}
		if n := g.refusals("sign") - before; n != 1 {
			t.Errorf("%s: counted %v times", name, n)
		}
	}
}

// A verdict is taken only where the agent's own plan lets identity alone decide.
func TestVerdictIsHeldAgainstThePlan(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	good := func(change func(*linepb.Verdict)) *linepb.Verdict {
		v := &linepb.Verdict{
			SourceIdentity: g.number("client"), SourceNetns: g.near.Cookie, Address: serverAt.Addr().AsSlice(), Port: uint32(serverAt.Port()),
			Action: uint32(flow.ActionDirect), TtlNs: int64(time.Minute), PolicyGeneration: g.view.Load().generation,
		}
		change(v)
		return v
	}
	if why := h.verdict(good(func(*linepb.Verdict) {})); why != "" {
		t.Fatal(why)
	}
	for _, c := range []struct {
		name    string
		verdict *linepb.Verdict
		why     string
	}{
		{"not decided by identity alone", good(func(v *linepb.Verdict) { v.Port = uint32(webAt.Port()) }), "not decided by identity alone"},
		{"a port that is not protected", good(func(v *linepb.Verdict) { v.Port = 22 }), "not decided by identity alone"},
		{"an address that is not here", good(func(v *linepb.Verdict) { v.Address, v.Port = slice("198.51.100.7"), 9000 }), "not decided by identity alone"},
		{"loopback of a namespace where it does not serve", good(func(v *linepb.Verdict) {
			v.Address, v.SourceIdentity, v.SourceNetns = slice("127.0.0.1"), g.number("stranger"), g.other.Cookie
		}), "not decided by identity alone"},
		{"a caller who may not", good(func(v *linepb.Verdict) { v.SourceIdentity = g.number("soft") }), "not decided by identity alone"},
		{"a caller past its validity", good(func(v *linepb.Verdict) { v.SourceIdentity = g.number("lapsed") }), "not decided by identity alone"},
		{"a caller that lives elsewhere", good(func(v *linepb.Verdict) { v.SourceNetns = g.other.Cookie }), "does not live in that namespace"},
		{"a number nobody has", good(func(v *linepb.Verdict) { v.SourceIdentity = 1 << 30 }), "does not live in that namespace"},
		{"nobody", good(func(v *linepb.Verdict) { v.SourceIdentity = 0 }), "does not live in that namespace"},
		{"an earlier generation", good(func(v *linepb.Verdict) { v.PolicyGeneration-- }), "another policy generation"},
		{"a later generation", good(func(v *linepb.Verdict) { v.PolicyGeneration++ }), "another policy generation"},
		{"deny", good(func(v *linepb.Verdict) { v.Action = uint32(flow.ActionDeny) }), "malformed"},
		{"proxy", good(func(v *linepb.Verdict) { v.Action = uint32(flow.ActionProxy) }), "malformed"},
		{"an action that is direct only if cut", good(func(v *linepb.Verdict) { v.Action = 1<<8 | uint32(flow.ActionDirect) }), "malformed"},
		{"for no time", good(func(v *linepb.Verdict) { v.TtlNs = 0 }), "malformed"},
		{"for less than no time", good(func(v *linepb.Verdict) { v.TtlNs = -1 }), "malformed"},
		{"no address", good(func(v *linepb.Verdict) { v.Address = nil }), "malformed"},
		{"port 0", good(func(v *linepb.Verdict) { v.Port = 0 }), "malformed"},
		{"port over 65535", good(func(v *linepb.Verdict) { v.Port += 1 << 16 }), "malformed"},
	} {
		before := g.refusals("verdict")
		if why := h.verdict(c.verdict); !strings.Contains(why, c.why) {
			t.Errorf("%s: %q, want %q", c.name, why, c.why)
		}
		if n := g.refusals("verdict") - before; n != 1 {
			t.Errorf("%s: counted %v times", c.name, n)
		}
	}
	for _, name := range []string{"server", "client"} {
		if _, err := g.revoked.Revoke(revocations.Identity, g.spiffe(name), 0, "", ""); err != nil {
			t.Fatal(err)
		}
		if why := h.verdict(good(func(*linepb.Verdict) {})); !strings.Contains(why, "not decided by identity alone") {
			t.Errorf("%s revoked: %q", name, why)
		}
		must(t, g.revoked.Lift(revocations.Identity, g.spiffe(name)))
	}
}

func TestVerdictEndsWithItsIdentities(t *testing.T) {
	soon, later := &compile.Identity{Expires: time.Now().Add(time.Minute)}, &compile.Identity{Expires: time.Now().Add(time.Hour)}
	never := &compile.Identity{}
	for _, c := range []struct {
		name             string
		asked, most      time.Duration
		source, destined *compile.Identity
	}{
		{"as asked for", time.Second, time.Second, never, later},
		{"too long", 24 * time.Hour, maxVerdictTTL, never, later},
		{"longer than the caller's validity", 3 * time.Minute, time.Minute, soon, later},
		{"longer than the server's validity", 3 * time.Minute, time.Minute, never, soon},
	} {
		if got := (&view{}).verdictTTL(c.asked, c.source, c.destined); got > c.most || got < c.most-time.Second {
			t.Errorf("%s: %s, want %s", c.name, got, c.most)
		}
	}
}

// A taken-over process can lock nobody out for good, and lift nothing.
func TestRevocationsByScoreAreBounded(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	if _, err := g.revoked.Revoke(revocations.Subject, "iss|mallory", 0, "stolen", "root"); err != nil {
		t.Fatal(err)
	}
	revoke := func(kind, value string, until time.Time, why string) {
		must(t, h.Notify(&linepb.Message{Body: &linepb.Message_Revoke{Revoke: &linepb.Revoke{Kind: kind, Value: value, UntilUnixNs: until.UnixNano(), Why: why}}}))
	}
	for _, kind := range []string{"issuer", "serial", "", "everything"} {
		before := g.refusals("other")
		revoke(kind, "aa", time.Now().Add(time.Hour), "")
		h.settled()
		if n := g.refusals("other") - before; n != 2 { // settled is one
			t.Errorf("kind %q: counted %v times", kind, n-1)
		}
	}
	revoke("subject", "iss|mallory", time.Now().Add(time.Second), "so that it ends soon")
	revoke("jti", "odd", time.Now().Add(time.Hour), strings.Repeat("é", 99)+"\x00"+strings.Repeat("é", 99))
	for i := range maxScoredRevocations {
		revoke("jti", fmt.Sprint("t-", i), time.Now().Add(100*24*time.Hour), "score")
	}
	h.settled()
	entries, _ := g.revoked.List()
	if len(entries) != maxScoredRevocations { // less the one that changes nothing, more the operator's own
		t.Errorf("%d revocations: %v", len(entries), entries)
	}
	for _, e := range entries {
		switch {
		case e.Value == "iss|mallory":
			if !e.Until.IsZero() || e.By != "root" {
				t.Errorf("the operator's own is now %v", e)
			}
		case e.Until.IsZero() || time.Until(e.Until) > maxScoredTTL:
			t.Errorf("%v lasts too long", e)
		case !utf8.ValidString(e.Reason):
			t.Errorf("%q", e.Reason)
		}
	}
	if !slices.ContainsFunc(entries, func(e revocations.Entry) bool { return e.Value == "odd" }) {
		t.Error("a text that is cut lost the revocation")
	}
	if !slices.ContainsFunc(g.health.Problems(), func(p metrics.Problem) bool { return p.ID == "scored-revocations" }) {
		t.Error("over the cap, and nothing says so")
	}
	before := g.refusals("other")
	revoke("jti", "one-more", time.Now().Add(time.Hour), "")
	h.settled()
	if n := g.refusals("other") - before; n != 2 {
		t.Errorf("one over the cap: counted %v times", n-1)
	}
}

// What is no request is refused and counted, however often it comes, and the
// agent goes on serving.
func TestFloodIsRefusedAndCounted(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	const flood = 2000
	before := g.refusals("other")
	for i := 0; i < flood; {
		if h.Notify(&linepb.Message{Body: &linepb.Message_Start{Start: &linepb.Start{}}}) == nil {
			i++
			continue
		}
		h.settled() // the line is full: let it run empty
		before++
	}
	h.settled()
	if n := g.refusals("other") - before; n != flood+1 {
		t.Errorf("counted %v of %d", n, flood+1)
	}
	if g.session.Load() == nil || h.Err() != nil {
		t.Fatalf("the session ended: %v", h.Err())
	}
	if _, why := h.sign(g.spiffe("client"), request(t)); why != "" {
		t.Errorf("afterwards: %s", why)
	}
	if g.metric("sallyport_userspace_restarts_total") != 0 {
		t.Error("it was started again")
	}
}

// An address of a host that must prove its name is nobody's without that name.
func TestEgressOfAVerifiedHost(t *testing.T) {
	at := netip.MustParseAddrPort("203.0.113.9:443")
	v := &view{resolved: map[string][]netip.Addr{"a.test": {at.Addr()}, "b.test": {at.Addr()}, "c.test": {netip.MustParseAddr("203.0.113.10")}}}
	verified := func(host string) compile.Egress {
		return compile.Egress{Host: host, Ports: []uint16{443}, Verify: true}
	}
	any443 := []uint16{443}
	for _, c := range []struct {
		name   string
		egress []compile.Egress
		host   string
		want   bool
	}{
		{"its name", []compile.Egress{verified("a.test")}, "a.test", true},
		{"no name", []compile.Egress{verified("a.test")}, "", false},
		{"a name that is not listed", []compile.Egress{verified("a.test")}, "b.test", false},
		{"a name whose address it is not", []compile.Egress{verified("a.test"), verified("c.test")}, "c.test", false},
		{"the second of two", []compile.Egress{verified("a.test"), verified("b.test")}, "b.test", true},
		{"a range as well", []compile.Egress{verified("a.test"), {Prefix: netip.MustParsePrefix("203.0.113.0/24"), Ports: any443}}, "", true},
		{"any TLS", []compile.Egress{{Host: "a.test", Ports: any443}}, "", true},
	} {
		if got := v.egress(&compile.Identity{Egress: c.egress}, at, c.host); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}
