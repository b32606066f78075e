// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
)

// Client asks an agent over its control socket.
type Client struct {
	controlpb.ControlClient
	conn *grpc.ClientConn
}

// Dial connects to the socket at path. Its error says what to do: no agent,
// or no permission.
func Dial(ctx context.Context, path string) (*Client, error) {
	// Tried by hand first: gRPC's own error would hide the reason.
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
			return nil, fmt.Errorf("connect to %s: no agent serves it; start one with `sallyport agent`", path)
		case errors.Is(err, fs.ErrPermission):
			return nil, fmt.Errorf("connect to %s: not permitted; be root, or in the group %s to read", path, Group)
		}
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	c.Close()
	conn, err := grpc.NewClient("passthrough:///agent",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", path) }),
		grpc.WithTransportCredentials(peerCredentials{}),
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return &Client{controlpb.NewControlClient(conn), conn}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Text returns what an error of a call says, without gRPC's wrapping.
func Text(err error) string {
	s, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	if s.Code() == codes.Unavailable && s.Message() == "" {
		return "the agent is gone"
	}
	return s.Message()
}
