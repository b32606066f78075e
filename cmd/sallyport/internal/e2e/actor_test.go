// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
)

// actors are small ordinary programs for what curl and nginx cannot be made
// to do. They are started in cgroups and namespaces like any other.
var actors = map[string]func([]string) error{
	"dial": actDial, "echo": actEcho, "digest": actDigest, "idle": actIdle, "sink": actSink,
}

// actDial connects to ADDRESS and joins the connection to its standard input
// and output. The end of its input is a half-close. With a second argument it
// also waits until all of its input is sent.
func actDial(args []string) error {
	var d net.Dialer
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "connected")
	// A reset is told once, to whichever side asks first.
	written := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, os.Stdin)
		c.(*net.TCPConn).CloseWrite()
		written <- err
	}()
	if _, err = io.Copy(os.Stdout, c); err != nil {
		return err
	}
	if len(args) > 1 { // its input is at hand, and ends
		return <-written
	}
	return nil
}

// listen opens ADDRESS, with MPTCP where the second argument says so.
func listen(args []string) (net.Listener, error) {
	var c net.ListenConfig
	c.SetMultipathTCP(len(args) > 1 && args[1] == "mptcp")
	l, err := c.Listen(context.Background(), "tcp", args[0])
	if err == nil {
		fmt.Println("listening")
	}
	return l, err
}

func accept(args []string, serve func(net.Conn)) error {
	l, err := listen(args)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			serve(c)
		}()
	}
}

func actEcho(args []string) error {
	return accept(args, func(c net.Conn) { io.Copy(c, c) }) //nolint:errcheck // ends with the connection
}

// actDigest reads until the client's half-close, and only then answers.
func actDigest(args []string) error {
	return accept(args, func(c net.Conn) {
		h := sha256.New()
		n, err := io.Copy(h, c)
		if err == nil {
			fmt.Fprintf(c, "%d %s\n", n, hex.EncodeToString(h.Sum(nil)))
		}
	})
}

// actSink answers nothing and prints how many bytes it has ever been sent and
// how many connections it accepted, whenever a line is read.
func actSink(args []string) error {
	var conns, bytes atomic.Int64
	l, err := listen(args)
	if err != nil {
		return err
	}
	var once sync.Once
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				once.Do(func() { os.Stdin.Close() })
				return
			}
			conns.Add(1)
			go func() {
				n, _ := io.Copy(io.Discard, c)
				bytes.Add(n)
				c.Close()
			}()
		}
	}()
	b := make([]byte, 1)
	for {
		if _, err := os.Stdin.Read(b); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		fmt.Println(strconv.FormatInt(conns.Load(), 10), strconv.FormatInt(bytes.Load(), 10))
	}
}

// actIdle is there, and that is all, until its input ends.
func actIdle([]string) error {
	fmt.Println("idle")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
