// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/tls"
	"encoding/hex"
	"net/netip"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/proxy/tunnel"
)

// identify makes the field lines that tell the application who calls.
func (c *call) identify() {
	c.add = c.add[:0]
	if c.peer.ID == "" {
		return
	}
	c.add = append(c.add, "X-Forwarded-Client-Cert: "...)
	if c.targetID != "" {
		c.add = append(append(append(c.add, "By="...), c.targetID...), ';')
	}
	if c.peer.Serial != "" && len(c.peer.Thumbprints) == 1 {
		c.add = append(c.add, "Hash="...)
		c.add = append(hex.AppendEncode(c.add, c.peer.Thumbprints[0][:]), ';')
	}
	c.add = append(append(append(c.add, "URI="...), c.peer.ID...), "\r\n"...)
}

// proven makes the flow's peer of a verified one.
func proven(peer identity.Peer, address netip.AddrPort, channel flow.Channel) flow.Peer {
	return flow.Peer{ID: peer.ID, Address: address, Channel: channel, Thumbprints: [][32]byte{peer.Thumbprint}, Serial: peer.Serial, NotAfter: peer.NotAfter}
}

// tunnel serves another node's tunnel.
func (p *Proxy) tunnel(t *netloop.Task, conn *netloop.Conn, ns *namespace) {
	secured := tls.Server(conn, ns.tunnelTLS)
	peer, ok := p.handshake(t, conn, secured)
	if !ok {
		return
	}
	server, err := p.view.Load().server(ns.cookie, secured.ConnectionState().ServerName)
	if err != nil {
		conn.Abort()
		return
	}
	cfg := p.opt.Tunnel
	cfg.NotAfter = peer.NotAfter
	if leaf, err := p.opt.Leaves.Get(server.ID); err == nil {
		cfg.NotAfter = earlier(cfg.NotAfter, leaf.NotAfter)
	}
	engine, id := t.Engine(), conn.ID()
	live := p.opt.Pipeline.Live()
	handle := live.Add(pipeline.Stream{Subjects: [4]string{peer.ID}, Serial: peer.Serial, Issued: time.Now(), Carries: true,
		Kill: func(flow.Reason) { engine.Kill(id, nil) }})
	defer live.Remove(handle)
	p.counts.tunnels.Add(1)
	defer p.counts.tunnels.Add(-1)
	remote := conn.RemoteAddrPort()
	given := &presented{}
	err = tunnel.Serve(t, secured, cfg, tunnel.Handler{
		Connect: func(t *netloop.Task, s *tunnel.Stream) {
			p.counts.streams.Add(1)
			p.stream(t, s, ns, server.ID, peer, given, remote)
			p.counts.streams.Add(-1)
		},
		Tokens: func(list []byte) bool { return given.take(list, peer.Thumbprint) },
	})
	if err != nil {
		p.opt.Logger.Debug("tunnel ended", "peer", peer.ID, "address", remote, "error", err)
	}
}

// handshake verifies who connects over TLS; a refusal is recorded.
func (p *Proxy) handshake(t *netloop.Task, conn *netloop.Conn, secured *tls.Conn) (identity.Peer, bool) {
	_ = conn.SetDeadline(time.Now().Add(p.opt.ConnectTimeout))
	err := secured.Handshake()
	var peer identity.Peer
	if err == nil {
		peer, err = p.opt.Verifier.PeerOf(secured.ConnectionState(), identity.RoleClient)
	}
	if err != nil {
		p.counts.handshakes.Add(1)
		c := p.newCall(t, conn)
		c.peer = flow.Peer{Address: conn.RemoteAddrPort(), Channel: flow.ChannelPlaintext}
		c.dst = conn.LocalAddrPort()
		c.begin(flow.ProtocolTCP)
		reason, detail := identity.ReasonOf(err)
		c.refuse(flow.StageChannel, reason, detail)
		c.d.Enforced = true
		c.record(0, 0)
		c.release()
		// The alert that crypto/tls wrote still leaves.
		_ = conn.Close()
		return peer, false
	}
	_ = conn.SetDeadline(time.Time{})
	return peer, true
}

// stream serves one CONNECT of a tunnel.
func (p *Proxy) stream(t *netloop.Task, s *tunnel.Stream, ns *namespace, serverID string, peer identity.Peer, given *presented, remote netip.AddrPort) {
	c := p.newCall(t, s)
	defer c.release()
	c.offered, c.netns, c.targetID, c.presented = s, ns.cookie, serverID, given
	c.peer = proven(peer, remote, flow.ChannelTunnel)
	dst, err := netip.ParseAddrPort(s.Request().Authority)
	if err == nil {
		c.dst = unmap(dst)
	}
	c.resolve()
	if err != nil || c.api == nil || !p.view.Load().has(ns.cookie, c.dst.Addr()) {
		c.turnAway(404, flow.ReasonNotThisNode, "no address of this node that the identity protects")
		return
	}
	if f := s.Request().Forwarded; f != "" {
		client, ok := forwardedFor(f, remote.Port())
		switch {
		case ok && believed(client.Addr(), remote.Addr(), c.src):
			c.peer.Address = client
		case c.enforced():
			c.turnAway(403, flow.ReasonForwardedAddress, unbelieved)
			return
		default: // it goes on with the address that the tunnel itself shows
			c.begin(flow.ProtocolTCP)
			c.refuse(flow.StageChannel, flow.ReasonForwardedAddress, unbelieved)
			c.record(0, 0)
		}
	}
	if !p.take(peer.ID) {
		c.turnAway(503, flow.ReasonOverload, "too many connections of the identity")
		return
	}
	defer p.give(peer.ID)
	s.Local, s.Remote = c.dst, c.peer.Address
	c.identify()
	c.serve()
}

const unbelieved = "the client's address is neither the peer's nor one of its identity's endpoints'"

// turnAway refuses a CONNECT whatever the mode: there is nowhere to go.
func (c *call) turnAway(status int, reason flow.Reason, detail string) {
	c.begin(flow.ProtocolTCP)
	c.refuse(flow.StageChannel, reason, detail)
	c.d.Enforced = true
	c.record(0, 0)
	c.p.counts.refused.Add(1)
	s := c.offered
	c.offered = nil
	_ = s.Refuse(status, string(reason))
}

// steered serves a connection from elsewhere to a protected port: its local
// address is the original destination.
func (p *Proxy) steered(t *netloop.Task, conn *netloop.Conn, ns *namespace) {
	c := p.newCall(t, conn)
	defer c.release()
	c.netns, c.dst = ns.cookie, conn.LocalAddrPort()
	c.peer = flow.Peer{Address: conn.RemoteAddrPort(), Channel: flow.ChannelPlaintext}
	api := p.view.Load().protected(ns.cookie, c.dst)
	if api == nil {
		c.begin(flow.ProtocolTCP)
		c.refuse(flow.StagePolicy, flow.ReasonNoPolicy, "a steered connection to a port that no policy protects")
		c.d.Enforced = true
		c.record(0, 0)
		conn.Abort()
		return
	}
	c.targetID = api.Identity.ID
	if !p.take("") {
		conn.Abort()
		return
	}
	defer p.give("")
	if api.AppTLS == compile.AppTLSNone && c.begins(api) == spokenTLS {
		c.resolve()
		if !c.enforced() && !c.meant() {
			c.cutOff(flow.ReasonTLSInApp, errHello.Error())
			return
		}
		if !c.terminate(conn, ns) {
			return
		}
	}
	c.serve()
}

// meant says whether the ClientHello that has begun asks for a server name
// of ours. Until its policy is enforced an application may speak TLS itself.
func (c *call) meant() bool {
	_ = c.client.SetReadDeadline(time.Now().Add(c.p.opt.HeadTimeout))
	name, ok, _ := c.hello()
	return ok && c.p.view.Load().names[name] != nil
}

// terminate takes the client's TLS, with a certificate that proves it.
func (c *call) terminate(conn *netloop.Conn, ns *namespace) bool {
	ahead := append([]byte(nil), c.buf[c.r:c.w]...)
	c.putBuffer()
	secured := tls.Server(&peeked{conn, ahead}, ns.steerTLS)
	peer, ok := c.p.handshake(c.t, conn, secured)
	if !ok {
		return false
	}
	c.client, c.opening = secured, spokenUnheard
	c.peer = proven(peer, conn.RemoteAddrPort(), flow.ChannelTLS)
	c.resolved = false
	c.identify()
	return true
}
