// SPDX-License-Identifier: Apache-2.0

// Command bench measures Sallyport beside its peers in one interleaved run on
// this machine: two nodes with agents, and two namespaces without any for the
// bare connection and for nginx and haproxy as mutual TLS pairs. It prints
// Markdown; with -write it goes between the marks of a document.
//
// Everything runs in network namespaces and cgroups of its own and is removed
// at the end, also after Ctrl-C. It needs root, nginx and wrk.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// options of a run.
type options struct {
	program     string // the sallyport binary
	rounds      int
	seconds     int   // of each measurement
	connections []int // keep-alive connections of wrk
	fresh       []int // connections at a time of the runs with one request a connection
	only        *regexp.Regexp
	write       string // document to write into, "" to print alone
	progress    func(format string, args ...any)
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == connectVerb {
		if err := connectMain(os.Args[2:], os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	o := options{progress: func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }}
	var connections, fresh, only string
	flag.StringVar(&o.program, "sallyport", "bin/sallyport", "the binary to measure")
	flag.IntVar(&o.rounds, "rounds", 9, "rounds; every variant is measured once in each")
	flag.IntVar(&o.seconds, "seconds", 2, "of each measurement")
	flag.StringVar(&connections, "connections", "1,16,64,512", "keep-alive connections")
	flag.StringVar(&fresh, "fresh", "1,16", "connections at a time, with one request each")
	flag.StringVar(&only, "only", "", "measure only the variants whose name matches; the bare connection always is")
	flag.StringVar(&o.write, "write", "", "document to write the result into")
	flag.Parse()
	var err error
	if o.connections, err = numbers(connections); err != nil {
		return fmt.Errorf("-connections: %w", err)
	}
	if o.fresh, err = numbers(fresh); err != nil {
		return fmt.Errorf("-fresh: %w", err)
	}
	if o.only, err = regexp.Compile(only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if flag.NArg() > 0 || o.rounds < 1 || o.seconds < 1 {
		return errors.New("no arguments; at least one round of one second")
	}
	if os.Geteuid() != 0 {
		return errors.New("it needs root: network namespaces, cgroups and BPF")
	}
	r, err := measure(ctx, o)
	if err != nil {
		return err
	}
	text := r.markdown()
	fmt.Print(text)
	if o.write == "" {
		return nil
	}
	return writeBetweenMarks(o.write, text)
}

// numbers reads a list of positive numbers with commas between; "" is none.
func numbers(s string) ([]int, error) {
	var out []int
	for f := range strings.SplitSeq(s, ",") {
		if s == "" {
			break
		}
		n, err := strconv.Atoi(f)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q is no list of positive numbers", s)
		}
		out = append(out, n)
	}
	return out, nil
}
