// SPDX-License-Identifier: Apache-2.0

package keys

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"
)

const maxRedirects = 3

// client fetches over HTTPS. It has two transports, so that a connection made
// for the node's own policies is never used for a tenant's.
type client struct {
	opt         *Options
	own, tenant http.Client
}

// validator is what makes the next fetch conditional (RFC 9110 section 13).
type validator struct{ etag, modified string }

func newClient(opt *Options) *client {
	c := &client{opt: opt}
	c.own = c.make(nil)
	c.tenant = c.make(refuseOwnAddress)
	return c
}

// make returns an HTTP client whose every connection passes through control
// after its address is known, which leaves a name that resolves differently
// the second time no way around it. Environment proxies are not used: behind
// one, an address could not be judged.
func (c *client) make(control func(network, address string, _ syscall.RawConn) error) http.Client {
	dialer := &net.Dialer{Control: control}
	return http.Client{
		Transport: &http.Transport{
			DialContext:            dialer.DialContext,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: c.opt.RootCAs},
			MaxResponseHeaderBytes: 32 << 10,
			MaxConnsPerHost:        2,
			MaxIdleConns:           parallel,
			IdleConnTimeout:        30 * time.Second,
			DisableCompression:     true, // an inflated document is another size than was bounded
		},
		CheckRedirect: sameHost,
	}
}

func sameHost(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	if req.URL.Scheme != "https" || req.URL.Host != via[0].URL.Host || req.URL.User != nil {
		return errors.New("it redirects to another host")
	}
	return nil
}

// permits says whether a URL of a policy may name a host. The addresses that
// it resolves to are judged at each connection.
func (c *client) permits(host string, tenant bool) error {
	if !tenant {
		return nil
	}
	if !c.opt.AllowHost(host) {
		return fmt.Errorf("host %s is not among those that a tenant's policy may name", host)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return judgeAddress(a)
	}
	return nil
}

func refuseOwnAddress(_, address string, _ syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	return judgeAddress(to.Addr())
}

// metadata are the addresses at which clouds serve a machine's credentials
// outside the link-local ranges.
var metadata = []netip.Addr{netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("168.63.129.16"), netip.MustParseAddr("100.100.100.200")}

// embedding are the IPv6 ranges that stand for IPv4 addresses, which a
// gateway may reach: NAT64 (RFC 6052, RFC 8215), 6to4 and Teredo.
var embedding = []netip.Prefix{
	netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("2001::/32"), netip.MustParsePrefix("::/96"),
}

// judgeAddress refuses the addresses that are this node's own or its
// network's services: loopback, link-local, unspecified, multicast, metadata.
func judgeAddress(a netip.Addr) error {
	a = a.Unmap().WithZone("")
	bad := a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255})
	for _, m := range metadata {
		bad = bad || a == m
	}
	for _, p := range embedding {
		bad = bad || p.Contains(a)
	}
	if a.Is4() && a.As4()[0] == 0 {
		bad = true
	}
	if bad {
		return fmt.Errorf("address %s is not one that a tenant's policy may reach", a)
	}
	return nil
}

// get fetches a document, nil where the server says that it has not changed.
// One deadline covers all of it, from the look-up to the last byte.
func (c *client) get(ctx context.Context, url string, tenant bool, had validator) ([]byte, validator, error) {
	ctx, cancel := context.WithTimeout(ctx, c.opt.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, validator{}, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	req.Header.Set("User-Agent", "sallyport")
	if had.etag != "" {
		req.Header.Set("If-None-Match", had.etag)
	} else if had.modified != "" {
		req.Header.Set("If-Modified-Since", had.modified)
	}
	client := &c.own
	if tenant {
		client = &c.tenant
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, validator{}, err
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusNotModified && had != (validator{}) {
		return nil, had, nil
	}
	if res.StatusCode != http.StatusOK {
		return nil, validator{}, fmt.Errorf("the answer is %d", res.StatusCode)
	}
	if coding := res.Header.Get("Content-Encoding"); coding != "" && coding != "identity" {
		return nil, validator{}, errors.New("the answer is compressed")
	}
	if res.ContentLength > MaxDocument {
		return nil, validator{}, fmt.Errorf("it is over %d bytes", MaxDocument)
	}
	document, err := bounded(res.Body)
	if err == nil {
		// A server that sees us leave may end its body in form, cut as it is.
		err = ctx.Err()
	}
	if err != nil {
		return nil, validator{}, err
	}
	return document, validator{res.Header.Get("ETag"), res.Header.Get("Last-Modified")}, nil
}

func (c *client) close() {
	c.own.CloseIdleConnections()
	c.tenant.CloseIdleConnections()
}
