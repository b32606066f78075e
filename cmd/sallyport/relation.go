// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
)

func newRelation() *cobra.Command {
	c := &cobra.Command{
		Use: "relation", Short: "Read and change relations",
		Example: `  sallyport relation write user:alice can_pay account:42
  sallyport relation check user:alice can_pay account:42
  sallyport relation list-objects user:alice can_pay account`,
	}
	socket := addSocket(c)
	model := c.PersistentFlags().String("model", "", "NAMESPACE/NAME of the RelationModel (default: the only one)")
	run := func(c *cobra.Command, q *controlpb.RelationRequest, show func(*controlpb.RelationReply) error) error {
		q.Model = *model
		return ask(c.Context(), *socket, func(ctx context.Context, client *control.Client) error {
			r, err := client.Relation(ctx, q)
			if err != nil {
				return err
			}
			return show(r)
		})
	}
	tuple := func(args []string) []*controlpb.Tuple {
		return []*controlpb.Tuple{{User: args[0], Relation: args[1], Object: args[2]}}
	}
	for _, v := range []struct{ op, short, done string }{{"write", "Write a relation", "written"}, {"delete", "Delete a relation", "deleted"}} {
		c.AddCommand(&cobra.Command{
			Use: v.op + " USER RELATION OBJECT", Short: v.short, Args: cobra.ExactArgs(3),
			RunE: func(c *cobra.Command, args []string) error {
				return run(c, &controlpb.RelationRequest{Op: v.op, Tuples: tuple(args)}, func(*controlpb.RelationReply) error {
					fmt.Fprintln(c.OutOrStdout(), v.done)
					return nil
				})
			},
		})
	}
	c.AddCommand(
		&cobra.Command{
			Use: "check USER RELATION OBJECT", Short: "Say whether a relation holds; exit 1 if it does not", Args: cobra.ExactArgs(3),
			RunE: func(c *cobra.Command, args []string) error {
				return run(c, &controlpb.RelationRequest{Op: "check", Tuples: tuple(args)}, func(r *controlpb.RelationReply) error {
					if !r.GetAllowed() {
						fmt.Fprintln(c.OutOrStdout(), "denied")
						return errSilent
					}
					fmt.Fprintln(c.OutOrStdout(), "allowed")
					return nil
				})
			},
		},
		&cobra.Command{
			Use: "list-objects USER RELATION TYPE", Short: "List what somebody has a relation to", Args: cobra.ExactArgs(3),
			RunE: func(c *cobra.Command, args []string) error {
				q := &controlpb.RelationRequest{Op: "list-objects", Type: args[2], Tuples: []*controlpb.Tuple{{User: args[0], Relation: args[1]}}}
				return run(c, q, func(r *controlpb.RelationReply) error {
					for _, o := range r.GetObjects() {
						fmt.Fprintln(c.OutOrStdout(), o)
					}
					return nil
				})
			},
		},
		&cobra.Command{
			Use: "model", Short: "Print the model", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				return run(c, &controlpb.RelationRequest{Op: "model"}, func(r *controlpb.RelationReply) error {
					fmt.Fprintln(c.OutOrStdout(), r.GetText())
					return nil
				})
			},
		},
		newRelationRead(run),
	)
	return c
}

func newRelationRead(run func(*cobra.Command, *controlpb.RelationRequest, func(*controlpb.RelationReply) error) error) *cobra.Command {
	c := &cobra.Command{Use: "read", Short: "List stored relations", Args: cobra.NoArgs}
	user := c.Flags().String("user", "", "of that user")
	relation := c.Flags().String("relation", "", "of that name")
	object := c.Flags().String("object", "", "on that object, or TYPE: for all of a type")
	limit := c.Flags().Uint32("limit", 100, "at most so many")
	c.RunE = func(c *cobra.Command, _ []string) error {
		q := &controlpb.RelationRequest{Op: "read", Limit: *limit, Tuples: []*controlpb.Tuple{{User: *user, Relation: *relation, Object: *object}}}
		return run(c, q, func(r *controlpb.RelationReply) error {
			for _, t := range r.GetTuples() {
				fmt.Fprintln(c.OutOrStdout(), t.GetUser(), t.GetRelation(), t.GetObject())
			}
			return nil
		})
	}
	return c
}
