// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/userspace/authority"
)

func newAuthority() *cobra.Command {
	var o authority.Options
	c := &cobra.Command{
		Use: "authority", Short: "Run the shared certificate authority of a handful of nodes", Args: cobra.NoArgs,
		Example: `  sallyport authority token create --node web-1 --id spiffe://example.org/ns/shop/sa/checkout > join-token
  sallyport authority`,
		RunE: func(c *cobra.Command, _ []string) error {
			o.Log = slog.New(slog.NewJSONHandler(c.ErrOrStderr(), nil))
			o.Banner = c.ErrOrStderr()
			return authority.Run(c.Context(), o)
		},
	}
	f := c.PersistentFlags()
	f.StringVar(&o.StateDir, "state-dir", "/var/lib/sallyport-authority", "directory of the root key, tokens and nodes")
	f.StringVar(&o.TrustDomain, "trust-domain", config.Defaults("").TrustDomain, "trust domain")
	f.StringVar(&o.TPM, "tpm", "auto", "TPM that holds the root key: auto, none, or a device or socket")
	f.BoolVar(&o.RequireTPM, "require-tpm", false, "refuse to run with a software key")
	c.Flags().StringVar(&o.Listen, "listen", authority.DefaultListen, "address to listen on")
	c.Flags().DurationVar(&o.IntermediateTTL, "intermediate-ttl", authority.DefaultIntermediateTTL, "life of a node's intermediate")
	c.AddCommand(newAuthorityToken(&o), newAuthorityNode(&o))
	return c
}

func newAuthorityToken(o *authority.Options) *cobra.Command {
	c := &cobra.Command{Use: "token", Short: "Make, list and void join tokens"}
	create := &cobra.Command{
		Use: "create --node NAME --id SPIFFE-ID...", Short: "Print a single-use join token for a node that may issue exactly these IDs", Args: cobra.NoArgs,
	}
	node := create.Flags().String("node", "", "name of the node")
	ids := create.Flags().StringArray("id", nil, "a SPIFFE ID that the node may issue; once for each")
	ttl := create.Flags().Duration("ttl", time.Hour, "how long it can be used")
	for _, required := range []string{"node", "id"} {
		if err := create.MarkFlagRequired(required); err != nil {
			panic(err)
		}
	}
	create.RunE = func(c *cobra.Command, _ []string) error {
		token, info, err := authority.CreateToken(*o, *node, *ids, *ttl)
		if err != nil {
			return err
		}
		fmt.Fprintln(c.OutOrStdout(), token)
		fmt.Fprintf(c.ErrOrStderr(), "token %s for node %s, %d IDs, until %s; it is shown this once\n", info.ID, info.Node, len(info.IDs), info.Expires.UTC().Format(time.RFC3339))
		return nil
	}
	list := &cobra.Command{
		Use: "list", Short: "List the tokens that were not used yet", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := authority.OpenStore(o.StateDir, o.TrustDomain)
			if err != nil {
				return err
			}
			tokens, err := s.Tokens()
			if err != nil {
				return err
			}
			return table(c.OutOrStdout(), func(row func(...any)) {
				row("TOKEN", "NODE", "IDS", "UNTIL")
				for _, t := range tokens {
					row(t.ID, t.Node, len(t.IDs), t.Expires.UTC().Format(time.RFC3339))
				}
			})
		},
	}
	void := &cobra.Command{
		Use: "revoke TOKEN", Short: "Void a token that was not used yet", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := authority.OpenStore(o.StateDir, o.TrustDomain)
			if err != nil {
				return err
			}
			return s.RevokeToken(args[0])
		},
	}
	c.AddCommand(create, list, void)
	return c
}

func newAuthorityNode(o *authority.Options) *cobra.Command {
	c := &cobra.Command{Use: "node", Short: "List nodes and what they may issue, and change it"}
	open := func() (*authority.Store, error) { return authority.OpenStore(o.StateDir, o.TrustDomain) }
	list := &cobra.Command{
		Use: "list", Short: "List the enrolled nodes", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := open()
			if err != nil {
				return err
			}
			nodes, err := s.Nodes()
			if err != nil {
				return err
			}
			return table(c.OutOrStdout(), func(row func(...any)) {
				row("NODE", "IDS", "SERIAL", "JOINED", "RENEWED")
				for _, n := range nodes {
					row(n.Node, len(n.IDs), orDash(n.Serial), n.Joined.UTC().Format(time.RFC3339), n.Renewed.UTC().Format(time.RFC3339))
				}
			})
		},
	}
	remove := &cobra.Command{
		Use: "remove NODE", Short: "End a node's renewals", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			s, err := open()
			if err != nil {
				return err
			}
			serial, err := s.RemoveNode(args[0])
			if err == nil && serial != "" {
				fmt.Fprintf(c.OutOrStdout(), "removed; its intermediate holds until it ends, or on each node: sallyport revoke serial %s\n", serial)
			}
			return err
		},
	}
	scope := &cobra.Command{
		Use: "scope NODE --id SPIFFE-ID...", Short: "Set what a node may issue from its next renewal on", Args: cobra.ExactArgs(1),
	}
	ids := scope.Flags().StringArray("id", nil, "a SPIFFE ID that the node may issue; once for each")
	scope.RunE = func(_ *cobra.Command, args []string) error {
		s, err := open()
		if err != nil {
			return err
		}
		return s.SetScope(args[0], *ids)
	}
	c.AddCommand(list, remove, scope)
	return c
}
