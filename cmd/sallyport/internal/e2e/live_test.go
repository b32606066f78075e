// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/net/websocket"
)

func init() { actors["live"], actors["chat"] = actLive, actChat }

// actLive serves WebSocket at the socket PATH: it says whom it takes for the
// client, then everything again.
func actLive(args []string) error {
	l, err := net.Listen("unix", args[0])
	if err != nil {
		return err
	}
	if err := os.Chmod(args[0], 0o777); err != nil {
		return err
	}
	fmt.Println("listening")
	return http.Serve(l, websocket.Server{Handler: func(c *websocket.Conn) {
		err := websocket.Message.Send(c, c.Request().Header.Get("X-Forwarded-Client-Cert"))
		for err == nil {
			var s string
			if err = websocket.Message.Receive(c, &s); err == nil {
				err = websocket.Message.Send(c, s)
			}
		}
	}})
}

// actChat opens a WebSocket at URL, sends a message and writes what comes,
// then how it ends.
func actChat(args []string) error {
	c, err := websocket.Dial(args[0], "", "http://app.example")
	if err != nil {
		fmt.Println("not opened:", err)
		return nil
	}
	if err := websocket.Message.Send(c, strings.Repeat("x", 100_000)); err != nil {
		return err
	}
	for {
		var s string
		if err := websocket.Message.Receive(c, &s); err != nil {
			fmt.Println("ended")
			return nil
		}
		if len(s) == 100_000 {
			s = "all of it"
		}
		fmt.Println(s)
	}
}

const (
	liveRules = "{name: read, from: [client], http: [\"GET /files/{name}\", \"HEAD /files/{name}\"]}"
	liveRule  = liveRules + `
    - {name: live, from: [client], http: ["GET /live/{name}"], upgrade: [websocket]}
    - {name: plain, from: [client], http: ["GET /live/plain/**"]}`
)

// TestWebSocket has a client of WebSocket reach a server behind nginx, on the
// same node and on another: by the rule that lists it, refused by the one that
// does not, and ended by a policy that lists it no more.
func TestWebSocket(t *testing.T) {
	require(t, "nginx", "curl")
	for _, engine := range []struct{ name, extra string }{{"loops", ""}, {"goroutines", "userspace: {goroutines: true}"}} {
		t.Run(engine.name, func(t *testing.T) {
			t.Parallel()
			a, b := two(t)
			a.extra, b.extra = engine.extra, engine.extra
			shop := strings.ReplaceAll(shopIn("enforce"), liveRules, liveRule)
			for _, n := range []*node{a, b} {
				n.policy("shop.yaml", shop)
			}
			b.start()
			a.start()
			w := startNginx(t, b.group("web"), b.ns, 8080)
			server(t, b.group("behind"), b.ns, "live", filepath.Join(w.dir, "tmp", "live.sock"))
			for _, n := range []*node{a, b} {
				act(t, n.group("client"), n.ns, "idle").line(t)
				n.served("client")
			}
			b.served("web")
			const url = "ws://" + addrB + ":8080/live/"
			var chats []*program
			for _, n := range []*node{a, b} {
				from := b.mark()
				c := act(t, n.group("client"), n.ns, "chat", url+"a")
				if got := c.line(t); !strings.HasSuffix(got, "URI="+n.id("client")) {
					t.Fatalf("the application took the client of %s for %q", n.name, got)
				}
				if got := c.line(t); got != "all of it" {
					t.Fatalf("got %q", got)
				}
				r := b.decided(from, "the upgrade", func(r *record) bool { return r.Rule == "live" })
				if r.Upgrade != "websocket" || r.Decision != "allow" || r.Source != n.id("client") {
					t.Errorf("record %+v", r)
				}
				chats = append(chats, c)
				if got := act(t, n.group("client"), n.ns, "chat", url+"plain/a").line(t); !strings.HasPrefix(got, "not opened") {
					t.Errorf("by a rule that does not list it: %q", got)
				}
				handshake := []string{"-H", "Connection: Upgrade", "-H", "Upgrade: websocket", "-H", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "-H", "Sec-WebSocket-Version: 13"}
				if got := code(t, n.group("client"), n.ns, webURL+"/live/plain/a", handshake...); got != "403 http_upgrade" {
					t.Errorf("by a rule that does not list it: %q", got)
				}
			}
			b.policy("shop.yaml", strings.ReplaceAll(shop, ", upgrade: [websocket]", ""))
			b.hangUp()
			for _, c := range chats {
				if got := c.line(t); got != "ended" {
					t.Errorf("it goes on: %q", got)
				}
			}
		})
	}
}
