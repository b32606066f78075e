// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/sockdiag"
	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/lab"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// cases are all cases, in the order in which they run.
var cases = []scenario{
	{"a call on one node", "200", "policy", func(ctx context.Context, d *demo) (string, string, error) {
		return d.http(ctx, d.b, "auditor", appRequest{Method: "GET", URL: paymentsURL + "/v1/payments/7"})
	}},
	{"a call from node a to node b, with a bound token and a relation", "200", "policy", func(ctx context.Context, d *demo) (string, string, error) {
		return d.pay(ctx, "alice", 5*time.Minute, "")
	}},
	{"the server's own accept() shows the true client", "same address", "", acceptShowsClient},
	{"the client's own getpeername() shows the true server", ledgerAddr, "", peerShowsServer},
	{"no token", "401 token_missing", "token", func(ctx context.Context, d *demo) (string, string, error) {
		return d.http(ctx, d.b, "checkout", appRequest{Method: "POST", URL: paymentsURL + "/v1/payments", Header: map[string]string{"X-Account": "42"}, Body: "{}"})
	}},
	{"an expired token", "401 token_expired", "token", func(ctx context.Context, d *demo) (string, string, error) {
		return d.pay(ctx, "alice", -time.Minute, "")
	}},
	{"a token that is bound to another certificate", "401 token_binding", "token", func(ctx context.Context, d *demo) (string, string, error) {
		return d.pay(ctx, "alice", 5*time.Minute, strings.Repeat("5a", 32))
	}},
	{"a caller without the relation", "403 relation_missing", "relation", func(ctx context.Context, d *demo) (string, string, error) {
		return d.pay(ctx, "mallory", 5*time.Minute, "")
	}},
	{"a path that no rule allows", "403 no_rule", "policy", func(ctx context.Context, d *demo) (string, string, error) {
		return d.http(ctx, d.b, "checkout", appRequest{Method: "DELETE", URL: paymentsURL + "/v1/payments/7"})
	}},
	{"a workload without identity, from the other node", "403 mtls_required", "channel", func(ctx context.Context, d *demo) (string, string, error) {
		return d.http(ctx, d.b, "nobody", appRequest{Method: "GET", URL: paymentsURL + "/v1/payments/7"})
	}},
	{"a workload without identity, on the same node", "403 mtls_required", "channel", func(ctx context.Context, d *demo) (string, string, error) {
		return d.http(ctx, d.b, "nobody-b", appRequest{Method: "GET", URL: paymentsURL + "/v1/payments/7"})
	}},
	{"plaintext from outside, over IPv4", "403 mtls_required", "channel", func(ctx context.Context, d *demo) (string, string, error) {
		return d.http(ctx, d.b, "stranger", appRequest{Method: "GET", URL: "http://10.77.3.2:8080/v1/payments/7"})
	}},
	{"plaintext from outside, over IPv6", "403 mtls_required", "channel", func(ctx context.Context, d *demo) (string, string, error) {
		return d.http(ctx, d.b, "stranger", appRequest{Method: "GET", URL: "http://[fd77:3::2]:8080/v1/payments/7"})
	}},
	{"an identity that its node's join token does not name", "refused", "identity", unnamedIdentity},
	{"a node that signs an ID outside its join token all the same", "refused", "channel", rogueNode},
	{"an injection in a learned endpoint", "429 throttled", "anomaly", injection},
	{"the same endpoint, called as always", "200", "policy", func(ctx context.Context, d *demo) (string, string, error) {
		return d.http(ctx, d.b, "checkout", appRequest{Method: "GET", URL: catalogURL + "/v1/items?id=117&sort=name"})
	}},
	{"a call on one node that identity alone decides goes direct", "direct: nothing on 15001", "kernel", direct},
	{"a squatter that bound before the agent started", "refused; squatter saw 0", "kernel", earlySquatter},
	{"a squatter inside the subtree, while the server is down", "operation not permitted", "kernel", insideSquatter},
	{"a squatter outside the subtree, while the server is down", "502/503; squatter saw 0", "upstream", outsideSquatter},
	{"a policy that is edited while it runs", "403 no_rule, then 200", "policy", editedPolicy},
	{"a broken policy file", "200, and status names the line", "policy", brokenPolicy},
	{"a revocation closes a live connection", "closed; then refused", "channel", revocation},
	{"the agent killed: the protected port refuses", "refused", "kernel", killed},
	{"the agent dead: a squatter on 15001 gets nothing", "refused; squatter saw 0", "kernel", squatterOnOurs},
	{"the agent back: it takes over the pins and serves", "200", "policy", restarted},
	{"the revocation still holds after the restart", "refused", "channel", stillRevoked},
	{"a certificate that rotates every 2 s under traffic", "rotated, 0 lost", "policy", rotation},
}

// problem is the body of a refusal (RFC 9457).
type problem struct {
	Reason    string `json:"reason"`
	RequestID string `json:"requestID"`
}

// http has an application make a call, and finds in the decision log of the
// node that decides where it was decided: by the request id of a refusal, else
// by the client's address, which the server saw.
func (d *demo) http(ctx context.Context, decides *lab.Node, app string, q appRequest) (got, by string, err error) {
	q.Op = "http"
	offset := decides.LogEnd()
	r := d.apps[app].do(q)
	if r.Err != "" {
		return r.Err, "", nil
	}
	got = fmt.Sprint(r.Status)
	var fits func(*lab.Record) bool
	if r.Status == 200 {
		var e echoReply
		if err := json.Unmarshal([]byte(r.Body), &e); err != nil {
			return got, "", fmt.Errorf("read the server's answer: %w", err)
		}
		client, err := netip.ParseAddrPort(e.Peer)
		if err != nil {
			return got, "", fmt.Errorf("read the server's answer: %w", err)
		}
		client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
		fits = func(rec *lab.Record) bool { return rec.Client == client }
	} else {
		var p problem
		if err := json.Unmarshal([]byte(r.Body), &p); err != nil {
			return got + " " + strings.TrimSpace(r.Body), "", nil
		}
		got += " " + p.Reason
		fits = func(rec *lab.Record) bool { return rec.RequestID == p.RequestID }
	}
	rec, err := decides.Decided(ctx, offset, fits)
	if err != nil {
		return got, "", err
	}
	return got, rec.Stage, nil
}

// pay makes the payment call as checkout on node a. thumbprint is what the
// token is bound to, "" for the caller's own certificate.
func (d *demo) pay(ctx context.Context, subject string, life time.Duration, thumbprint string) (got, by string, err error) {
	if thumbprint == "" {
		if thumbprint, err = d.a.Thumbprint(ctx, "checkout"); err != nil {
			return "", "", err
		}
	}
	token, err := d.issuer.Token(subject, thumbprint, life)
	if err != nil {
		return "", "", err
	}
	return d.http(ctx, d.b, "checkout", appRequest{
		Method: "POST", URL: paymentsURL + "/v1/payments", Body: `{"amount": 12}`,
		Header: map[string]string{"Authorization": "Bearer " + token, "X-Account": "42", "Content-Type": "application/json"},
	})
}

// opaque makes a connection, sends over it, and says what came back.
func (d *demo) opaque(app, addr string) (conn appReply, got string) {
	c := d.apps[app].do(appRequest{Op: "dial", Addr: addr})
	if c.Err != "" {
		return c, "refused"
	}
	r := d.apps[app].do(appRequest{Op: "exchange", Conn: c.Conn, Data: "hello"})
	if r.Err != "" {
		return c, "refused"
	}
	return c, r.Data
}

func (d *demo) hangUp(app string, c appReply) { d.apps[app].do(appRequest{Op: "close", Conn: c.Conn}) }

func acceptShowsClient(_ context.Context, d *demo) (string, string, error) {
	d.apps["ledger"].do(appRequest{Op: "seen", Addr: ":9090"})
	c, got := d.opaque("checkout", ledgerAddr)
	defer d.hangUp("checkout", c)
	if got != "hello" {
		return got, "", nil
	}
	seen := d.apps["ledger"].do(appRequest{Op: "seen", Addr: ":9090"}).Seen
	if len(seen) != 1 {
		return fmt.Sprintf("%d connections", len(seen)), "", nil
	}
	// The client's socket ends at our listener on loopback, so that its own
	// view of its address is that; the port and the node are what is true.
	local, err := netip.ParseAddrPort(c.Local)
	if err != nil {
		return "", "", err
	}
	peer, err := netip.ParseAddrPort(seen[0].Peer)
	if err != nil {
		return "", "", err
	}
	if want := netip.AddrPortFrom(netip.MustParseAddr("10.77.1.1"), local.Port()); netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()) != want {
		return fmt.Sprintf("%s for %s", peer, want), "", nil
	}
	return "same address", "", nil
}

func peerShowsServer(_ context.Context, d *demo) (string, string, error) {
	c := d.apps["checkout"].do(appRequest{Op: "dial", Addr: ledgerAddr})
	if c.Err != "" {
		return c.Err, "", nil
	}
	d.hangUp("checkout", c)
	return c.Peer, "", nil
}

// refusedFor finds which stage refused for a reason.
func (d *demo) refusedFor(ctx context.Context, n *lab.Node, offset int64, reason string) (string, error) {
	rec, err := n.Decided(ctx, offset, func(r *lab.Record) bool { return r.Reason == reason && r.Decision != "allow" })
	if err != nil {
		return "", err
	}
	return rec.Stage, nil
}

func unnamedIdentity(ctx context.Context, d *demo) (string, string, error) {
	offset := d.a.LogEnd()
	_, got := d.opaque("reports", ledgerAddr)
	rec, err := d.a.Decided(ctx, offset, func(r *lab.Record) bool { return r.Address.String() == ledgerAddr && r.Decision != "allow" })
	if err != nil {
		return got, "", err
	}
	return got, rec.Stage, nil
}

// injection teaches the catalog what is normal, and then is not.
func injection(ctx context.Context, d *demo) (string, string, error) {
	for i := range 260 {
		q := appRequest{Op: "http", Method: "GET", URL: fmt.Sprintf("%s/v1/items?id=%d&sort=%s", catalogURL, 100+i%57, []string{"name", "price"}[i%2])}
		if r := d.apps["checkout"].do(q); r.Status != 200 {
			return fmt.Sprintf("call %d while learning: %d %s %s", i, r.Status, r.Err, strings.TrimSpace(r.Body)), "", nil
		}
	}
	return d.http(ctx, d.b, "checkout", appRequest{Method: "GET", URL: catalogURL + "/v1/items?id=1%27%20OR%20%271%27=%271&sort=name"})
}

// direct calls twice: the first goes through the proxy and brings the verdict,
// the second needs no proxy any more.
func direct(ctx context.Context, d *demo) (string, string, error) {
	first, got := d.opaque("auditor", ledgerAddr)
	d.hangUp("auditor", first)
	if got != "hello" {
		return got, "", nil
	}
	ctx, cancel := context.WithTimeout(ctx, lab.SettleTimeout)
	defer cancel()
	for {
		before := d.b.Counter(ctx, "direct")
		c, got := d.opaque("auditor", ledgerAddr)
		if got != "hello" {
			return got, "", nil
		}
		found, err := d.socketsOf(c.Local)
		d.hangUp("auditor", c)
		if err != nil {
			return "", "", err
		}
		if found == "direct: nothing on 15001" {
			if d.b.Counter(ctx, "direct") == before {
				return found + ", but the kernel counted none", "", nil
			}
			return found, "kernel", nil
		}
		select {
		case <-ctx.Done():
			return found, "", nil
		case <-time.After(lab.PollInterval):
		}
	}
}

// socketsOf asks the kernel of node b how a client's connection ends: at the
// server itself, or at our listener.
func (d *demo) socketsOf(local string) (string, error) {
	client, err := netip.ParseAddrPort(local)
	if err != nil {
		return "", err
	}
	server := netip.MustParseAddrPort(ledgerAddr)
	c, err := sockdiag.Open(d.lab.Space("b"))
	if err != nil {
		return "", err
	}
	defer c.Close() //nolint:errcheck // nothing to be done about it
	list, err := c.List(sockdiag.Established)
	if err != nil {
		return "", err
	}
	var clientEnd, serverEnd, ours bool
	for _, s := range list {
		clientEnd = clientEnd || s.Local == client && s.Remote == server
		serverEnd = serverEnd || s.Local == server && s.Remote == client
		ours = ours || s.Local == client && s.Remote.Port() == 15001
	}
	if clientEnd && serverEnd && !ours {
		return "direct: nothing on 15001", nil
	}
	return fmt.Sprintf("client %t, server %t, by 15001 %t", clientEnd, serverEnd, ours), nil
}

func seen(a *application, addr string) string {
	r := a.do(appRequest{Op: "seen", Addr: addr})
	if r.Err != "" {
		return r.Err
	}
	return fmt.Sprintf("squatter saw %d", len(r.Seen))
}

func earlySquatter(ctx context.Context, d *demo) (string, string, error) {
	before := d.b.Counter(ctx, "refused/server_gone") + d.b.Counter(ctx, "served")
	_, got := d.opaque("checkout", vaultAddr)
	_, local := d.opaque("nobody-b", vaultAddr)
	if local != "refused" {
		got += ", same node " + local
	}
	by := ""
	if d.b.Counter(ctx, "steered") > 0 && d.b.Counter(ctx, "refused/server_gone")+d.b.Counter(ctx, "served") == before {
		by = "kernel" // every SYN went to the proxy, none to a listener on the port
	}
	return got + "; " + seen(d.apps["early-squatter"], "0.0.0.0:7070"), by, nil
}

// withoutPayments runs f while the payments server is down.
func (d *demo) withoutPayments(f func() (string, string, error)) (string, string, error) {
	d.apps["payments"].do(appRequest{Op: "stop", Addr: ":8080"})
	got, by, err := f()
	if r := d.apps["payments"].do(appRequest{Op: "serve", Kind: "http", Addr: ":8080"}); r.Err != "" {
		err = errors.Join(err, fmt.Errorf("payments to listen again: %s", r.Err))
	}
	return got, by, err
}

func insideSquatter(ctx context.Context, d *demo) (string, string, error) {
	return d.withoutPayments(func() (string, string, error) {
		offset := d.b.LogEnd()
		r := d.apps["nobody-b"].do(appRequest{Op: "serve", Kind: "tcp", Addr: ":8080"})
		if r.Err == "" {
			d.apps["nobody-b"].do(appRequest{Op: "stop", Addr: ":8080"})
			return "bound", "", nil
		}
		rec, err := d.b.Decided(ctx, offset, func(r *lab.Record) bool { return r.Reason == "bind_guard" })
		if err != nil {
			return r.Err, "", err
		}
		return r.Err, rec.Stage, nil
	})
}

func outsideSquatter(ctx context.Context, d *demo) (string, string, error) {
	return d.withoutPayments(func() (string, string, error) {
		squatter := d.apps["outsider-b"]
		if r := squatter.do(appRequest{Op: "serve", Kind: "tcp", Addr: ":8080"}); r.Err != "" {
			return "squatter: " + r.Err, "", nil
		}
		got, by, err := d.http(ctx, d.b, "auditor", appRequest{Method: "GET", URL: paymentsURL + "/v1/payments/7", Fresh: true})
		if strings.HasPrefix(got, "502") || strings.HasPrefix(got, "503") {
			got = "502/503"
		}
		for _, who := range []string{"nobody-b", "stranger"} {
			addr := nodeB + ":8080"
			if who == "stranger" {
				addr = "10.77.3.2:8080"
			}
			c, _ := d.opaque(who, addr)
			d.hangUp(who, c)
		}
		got += "; " + seen(squatter, ":8080")
		squatter.do(appRequest{Op: "stop", Addr: ":8080"})
		return got, by, err
	})
}

// editPolicies changes a policy file of node b the way an editor does, by
// rename, and waits until the node has taken note.
func (d *demo) editPolicies(ctx context.Context, from, to string, noted func(*controlpb.StatusReply) bool) error {
	path := d.b.Path("policies/apis.yaml")
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), from) {
		return fmt.Errorf("edit %s: %q is not there", path, from)
	}
	if err := os.WriteFile(path+".new", []byte(strings.Replace(string(b), from, to, 1)), 0o644); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return d.b.Await(ctx, lab.SettleTimeout, "take note of the policies", noted)
}

// generation waits for another policy generation than now.
func (d *demo) nextGeneration(ctx context.Context) (func(*controlpb.StatusReply) bool, error) {
	s, err := d.b.Status(ctx)
	if err != nil {
		return nil, err
	}
	now := s.GetPolicySet().GetGeneration()
	return func(s *controlpb.StatusReply) bool { return s.GetPolicySet().GetGeneration() > now && s.GetReady() }, nil
}

func editedPolicy(ctx context.Context, d *demo) (string, string, error) {
	read := appRequest{Method: "GET", URL: paymentsURL + "/v1/payments/7"}
	var got []string
	var by string
	for _, e := range [][2]string{{"GET /v1/payments/{id}", "GET /v2/payments/{id}"}, {"GET /v2/payments/{id}", "GET /v1/payments/{id}"}} {
		noted, err := d.nextGeneration(ctx)
		if err != nil {
			return "", "", err
		}
		if err := d.editPolicies(ctx, e[0], e[1], noted); err != nil {
			return "", "", err
		}
		one, stage, err := d.http(ctx, d.b, "auditor", read)
		if err != nil {
			return one, stage, err
		}
		got, by = append(got, one), stage
	}
	return strings.Join(got, ", then "), by, nil
}

func brokenPolicy(ctx context.Context, d *demo) (string, string, error) {
	refused := func(s *controlpb.StatusReply) bool { return len(s.GetPolicySet().GetErrors()) > 0 }
	if err := d.editPolicies(ctx, "protocol: http", "protokol: http", refused); err != nil {
		return "", "", err
	}
	got, by, err := d.http(ctx, d.b, "auditor", appRequest{Method: "GET", URL: paymentsURL + "/v1/payments/7"})
	s, statusErr := d.b.Status(ctx)
	if statusErr != nil {
		return got, by, statusErr
	}
	first := s.GetPolicySet().GetErrors()[0]
	if strings.HasPrefix(first, "apis.yaml:") && strings.Contains(first, "protokol") && s.GetPolicySet().GetLastGood() {
		got += ", and status names the line"
	} else {
		got += ", and status says " + first
	}
	mended := func(s *controlpb.StatusReply) bool { return len(s.GetPolicySet().GetErrors()) == 0 }
	return got, by, errors.Join(err, d.editPolicies(ctx, "protokol: http", "protocol: http", mended))
}

func revocation(ctx context.Context, d *demo) (string, string, error) {
	live, got := d.opaque("checkout", ledgerAddr)
	if got != "hello" {
		return "not live: " + got, "", nil
	}
	if _, err := d.b.Sallyport(ctx, "revoke", "identity", d.a.ID("checkout"), "--why", "demo"); err != nil {
		return "", "", err
	}
	// The end of a closed connection is an event for who reads it.
	r := d.apps["checkout"].do(appRequest{Op: "exchange", Conn: live.Conn, Data: ""})
	d.hangUp("checkout", live)
	if r.Err == "" || r.Err == "timeout" {
		return "still live", "", nil
	}
	offset := d.b.LogEnd()
	if _, got := d.opaque("checkout", ledgerAddr); got != "refused" {
		return "closed; then " + got, "", nil
	}
	by, err := d.refusedFor(ctx, d.b, offset, "identity_revoked")
	return "closed; then refused", by, err
}

func stillRevoked(ctx context.Context, d *demo) (string, string, error) {
	offset := d.b.LogEnd()
	_, got := d.opaque("checkout", ledgerAddr)
	by, err := d.refusedFor(ctx, d.b, offset, "identity_revoked")
	if err != nil {
		return got, by, err
	}
	_, err = d.b.Sallyport(ctx, "revoke", "lift", "identity", d.a.ID("checkout"))
	return got, by, err
}

// killed ends node b's agent, it alone, with SIGKILL.
func killed(ctx context.Context, d *demo) (string, string, error) {
	d.b.HangUp()
	d.b.Agent.Kill()
	before, err := d.b.KernelRefusals(flow.ReasonListenerGone)
	if err != nil {
		return "", "", err
	}
	for who, addr := range map[string]string{"checkout": nodeB + ":8080", "nobody-b": nodeB + ":8080", "stranger": "10.77.3.2:8080"} {
		if c, got := d.opaque(who, addr); got != "refused" {
			d.hangUp(who, c)
			return who + " got " + got, "", nil
		}
	}
	by, err := d.b.DecidedByKernel(before)
	if err != nil {
		return "refused", by, err
	}
	// What identity alone decides goes on until the agent's sign of life is
	// stale, 3 s after the last.
	ctx, cancel := context.WithTimeout(ctx, lab.SettleTimeout)
	defer cancel()
	for {
		c, got := d.opaque("auditor", ledgerAddr)
		if got == "refused" {
			return "refused", by, nil
		}
		d.hangUp("auditor", c)
		select {
		case <-ctx.Done():
			return "direct went on: " + got, by, nil
		case <-time.After(lab.PollInterval):
		}
	}
}

func squatterOnOurs(_ context.Context, d *demo) (string, string, error) {
	squatter := d.apps["outsider-b"]
	if r := squatter.do(appRequest{Op: "serve", Kind: "tcp", Addr: "127.0.0.1:15001"}); r.Err != "" {
		return "squatter: " + r.Err, "", nil
	}
	before, err := d.b.KernelRefusals(flow.ReasonListenerGone)
	if err != nil {
		return "", "", err
	}
	_, got := d.opaque("auditor", ledgerAddr)
	got += "; " + seen(squatter, "127.0.0.1:15001")
	squatter.do(appRequest{Op: "stop", Addr: "127.0.0.1:15001"})
	by, err := d.b.DecidedByKernel(before)
	return got, by, err
}

func restarted(ctx context.Context, d *demo) (string, string, error) {
	if err := d.b.Start(ctx); err != nil {
		return "", "", err
	}
	for _, id := range []string{"payments", "auditor"} {
		if _, err := d.b.Thumbprint(ctx, id); err != nil {
			return "", "", err
		}
	}
	return d.http(ctx, d.b, "auditor", appRequest{Method: "GET", URL: paymentsURL + "/v1/payments/7", Fresh: true})
}

// rotation restarts node a with certificates of 2 s and calls through two
// rotations.
func rotation(ctx context.Context, d *demo) (string, string, error) {
	d.a.Stop()
	d.a.LeafTTL = 2 * time.Second
	if err := d.a.Start(ctx); err != nil {
		return "", "", err
	}
	first, err := d.a.Thumbprint(ctx, "checkout")
	if err != nil {
		return "", "", err
	}
	lost, by, last := 0, "", first
	deadline := time.Now().Add(lab.SettleTimeout)
	for rotations := 0; rotations < 3; {
		got, stage, err := d.http(ctx, d.b, "checkout", appRequest{Method: "GET", URL: paymentsURL + "/v1/payments/7"})
		if err != nil || got != "200" {
			lost++
			by = fmt.Sprint(got, " ", err)
		} else if lost == 0 {
			by = stage
		}
		s, err := d.a.Status(ctx)
		if err != nil {
			return "", "", err
		}
		if now := lab.LeafOf(s, d.a.ID("checkout")).Thumbprint; now != "" && now != last {
			rotations, last = rotations+1, now
		}
		if time.Now().After(deadline) {
			return fmt.Sprintf("%d rotations, %d lost", rotations, lost), by, nil
		}
	}
	return fmt.Sprintf("rotated, %d lost", lost), by, nil
}
