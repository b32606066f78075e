// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/schema"
)

func newPolicySchema() *cobra.Command {
	return &cobra.Command{
		Use: "schema [KIND]", Short: "Print the JSON Schema of policy documents, for editors", Args: cobra.MaximumNArgs(1),
		Long: "Print the JSON Schema (draft 7) of policy documents, or of one kind of them, for editors and other tools.\n" +
			"It tells what is wrong in form; all else only policy validate knows.",
		ValidArgs: schema.Kinds(),
		RunE: func(c *cobra.Command, args []string) error {
			kind := ""
			if len(args) == 1 {
				kind = args[0]
				for _, k := range schema.Kinds() {
					if strings.EqualFold(k, kind) {
						kind = k
					}
				}
			}
			text, err := schema.JSON(kind)
			if err != nil {
				return unknownField(err)
			}
			_, err = c.OutOrStdout().Write(text)
			return err
		},
	}
}

func newPolicyExplain() *cobra.Command {
	c := &cobra.Command{
		Use: "explain KIND[.FIELD...]", Short: "Say what a kind of document or a field of it is", Args: cobra.MaximumNArgs(1),
		Long: "Say what a kind of document or a field of it is, what it may hold, and what of it this version refuses.\n" +
			"Without an argument: the kinds.",
		Example: "  sallyport policy explain apipolicy.spec.rules.token\n  sallyport policy explain machineidentity --recursive",
	}
	out := addFormat(c)
	recursive := c.Flags().Bool("recursive", false, "also the fields of fields")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return explainKinds(c.OutOrStdout(), out.json, *recursive)
		}
		e, err := schema.Explain(args[0], *recursive)
		if err != nil {
			return unknownField(err)
		}
		if out.json {
			return writeJSON(c.OutOrStdout(), e)
		}
		explainField(c.OutOrStdout(), &e)
		return nil
	}
	return c
}

// unknownField adds what is there to the error of a path that leads nowhere.
func unknownField(err error) error {
	var unknown *schema.UnknownError
	if !errors.As(err, &unknown) {
		return err
	}
	if len(unknown.Known) == 0 {
		return fmt.Errorf("%w: it has no fields", err)
	}
	hint := load.DidYouMean(unknown.Name, unknown.Known, `"`)
	return fmt.Errorf("%w%s; it is one of %s", err, hint, strings.Join(unknown.Known, ", "))
}

func explainKinds(w io.Writer, asJSON, recursive bool) error {
	var kinds []schema.Entry
	for _, k := range schema.Kinds() {
		e, err := schema.Explain(k, recursive)
		if err != nil {
			return err
		}
		kinds = append(kinds, e)
	}
	if asJSON {
		return writeJSON(w, kinds)
	}
	for i := range kinds {
		fmt.Fprintf(w, "%s\n", kinds[i].Kind)
		paragraph(w, "    ", kinds[i].Doc)
		if recursive {
			fieldTree(w, kinds[i].Fields, 1)
		}
	}
	return nil
}

func explainField(w io.Writer, e *schema.Entry) {
	fmt.Fprintf(w, "%s\n\n", strings.TrimSuffix(e.Kind+"."+e.Path, "."))
	paragraph(w, "", e.Doc)
	fmt.Fprintf(w, "\nHolds: %s%s\n", e.Type, remarks(e))
	if len(e.Words) > 0 {
		fmt.Fprintf(w, "One of: %s\n", strings.Join(e.Words, ", "))
	}
	if len(e.Fields) == 0 {
		return
	}
	fmt.Fprintln(w, "\nFields:")
	fieldTree(w, e.Fields, 1)
}

func fieldTree(w io.Writer, fields []schema.Entry, depth int) {
	indent := strings.Repeat("    ", depth)
	for i := range fields {
		f := &fields[i]
		fmt.Fprintf(w, "%s%s  <%s>%s\n", indent, f.Name(), f.Type, remarks(f))
		doc := f.Doc
		if len(f.Words) > 0 {
			doc += " One of " + strings.Join(f.Words, ", ") + "."
		}
		paragraph(w, indent+"    ", doc)
		fieldTree(w, f.Fields, depth+1)
	}
}

// remarks are what is to be known of a field besides its type.
func remarks(e *schema.Entry) string {
	var s string
	if e.Required {
		s += ", required"
	}
	if e.Refused {
		s += ", " + strings.TrimPrefix(schema.NotSupported, "is ")
	}
	if len(e.RefusedWords) > 0 {
		s += ", " + strings.Join(e.RefusedWords, " and ") + " not supported by this version"
	}
	return s
}

// paragraph writes text in lines of at most 100 characters.
func paragraph(w io.Writer, indent, text string) {
	const width = 100
	for p := range strings.SplitSeq(text, "\n\n") {
		line := ""
		for word := range strings.FieldsSeq(p) {
			if line != "" && len(indent)+len(line)+1+len(word) > width {
				fmt.Fprintln(w, indent+line)
				line = ""
			}
			line = strings.TrimPrefix(line+" "+word, " ")
		}
		if line != "" {
			fmt.Fprintln(w, indent+line)
		}
	}
}
