// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
)

func newRevoke() *cobra.Command {
	c := &cobra.Command{
		Use: "revoke KIND VALUE", Short: "Revoke an identity, certificate, token, subject or issuer; live connections are closed",
		Long: `Revoke what VALUE names. It is on disk when the command returns, and what it
allowed is closed. KIND is one of

  identity   a SPIFFE ID
  serial     a certificate's serial number, hex
  jti        a token's id, or "ISSUER|ID" for that issuer's alone
  subject    "ISSUER|SUB"
  issuer     an issuer's URL`,
		Example: "  sallyport revoke identity spiffe://example.org/ns/shop/sa/checkout --for 1h --why incident-42",
		Args:    cobra.ExactArgs(2),
	}
	socket := addSocket(c)
	ttl := c.Flags().Duration("for", 0, "how long it holds (default: for good)")
	why := c.Flags().String("why", "", "for who reads it later")
	c.RunE = func(c *cobra.Command, args []string) error {
		return ask(c.Context(), *socket, func(ctx context.Context, client *control.Client) error {
			r, err := client.Revoke(ctx, &controlpb.RevokeRequest{Kind: args[0], Value: args[1], TtlNs: int64(*ttl), Reason: *why})
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "revoked %s %s until %s\n", r.GetKind(), r.GetValue(), end(r.GetUntilUnixNs()))
			return nil
		})
	}
	c.AddCommand(
		&cobra.Command{
			Use: "list", Short: "List what is revoked", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				return ask(c.Context(), *socket, func(ctx context.Context, client *control.Client) error {
					r, err := client.Revocations(ctx, &controlpb.RevocationsRequest{})
					if err != nil {
						return err
					}
					return table(c.OutOrStdout(), func(row func(...any)) {
						row("KIND", "VALUE", "SINCE", "UNTIL", "BY", "WHY")
						for _, e := range r.GetRevocations() {
							row(e.GetKind(), e.GetValue(), when(e.GetSinceUnixNs()), end(e.GetUntilUnixNs()), orDash(e.GetBy()), orDash(plain(e.GetReason())))
						}
					})
				})
			},
		},
		&cobra.Command{
			Use: "lift KIND VALUE", Short: "End a revocation before its time", Args: cobra.ExactArgs(2),
			RunE: func(c *cobra.Command, args []string) error {
				return ask(c.Context(), *socket, func(ctx context.Context, client *control.Client) error {
					if _, err := client.Unrevoke(ctx, &controlpb.UnrevokeRequest{Kind: args[0], Value: args[1]}); err != nil {
						return err
					}
					fmt.Fprintf(c.OutOrStdout(), "lifted %s %s\n", args[0], args[1])
					return nil
				})
			},
		},
	)
	return c
}

// end writes when a revocation ends.
func end(ns int64) string {
	if ns == 0 {
		return "lifted"
	}
	return time.Unix(0, ns).UTC().Format(time.RFC3339)
}
