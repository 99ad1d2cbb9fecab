package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

const (
	defaultOutbound = "127.0.0.1:15001"
	defaultInbound  = "0.0.0.0:15006"
	defaultGateway  = "0.0.0.0:15443"
	// introducedWithin bounds the first contact with the issuer.
	introducedWithin = 20 * time.Second
)

// joinOptions are the flags of "sallyport join".
type joinOptions struct {
	dir, data, user        string
	gateway                bool
	listen, advertise, app string
	outbound               string
	resolvers              []string
}

// join is "sallyport join".
func (c *cli) join() *cobra.Command {
	var o joinOptions
	cmd := &cobra.Command{
		Use: "join INVITATION", Short: "Make this machine a node of a trust domain", Args: cobra.ExactArgs(1),
		Long: `Write the configuration of a sidecar, or with --gateway of a gateway, by an
invitation: what "sallyport token create NODE --join HOST:PORT" has printed at
the issuer. The issuer is asked for the roots of the trust domain and must prove
itself by one whose fingerprint the invitation carries. The join token is used
when the sidecar starts, once.

INVITATION "-" is read from standard input, so that it is in no list of
processes. Nothing that is there already is replaced.`,
		Example: "  sallyport join - --app 127.0.0.1:8080 --advertise 10.0.0.7:15006 < invitation",
		RunE: func(cmd *cobra.Command, args []string) error {
			text := args[0]
			if text == "-" {
				b, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxInvitation+1))
				if err != nil {
					return usage(fmt.Errorf("read the invitation: %w", err))
				}
				text = string(b)
			}
			in, err := readInvitation(text)
			if err != nil {
				return usage(err)
			}
			return c.joinBy(cmd.Context(), in, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", defaultDir, "the directory of the configuration")
	f.StringVar(&o.data, "data", "", "the directory of the node's state (default: "+defaultData+"/NODE)")
	f.StringVar(&o.user, "user", "", "who is to own the files: the user that the sidecar runs as (default: who runs this)")
	f.BoolVar(&o.gateway, "gateway", false, "the node is a gateway, the way out of the mesh")
	f.StringVar(&o.app, "app", "", "where the application listens in clear text, on loopback; without it nobody calls the workload")
	f.StringVar(&o.listen, "listen", "", "where peers call: with --app by default "+defaultInbound+", with --gateway "+defaultGateway)
	f.StringVar(&o.advertise, "advertise", "", "the address that peers dial, when --listen is on every address")
	f.StringVar(&o.outbound, "outbound", defaultOutbound, "the proxy for the application, on loopback")
	f.StringArrayVar(&o.resolvers, "resolver", nil, "address:port of a DNS server that the gateway asks; may be repeated")
	return cmd
}

// starter checks the flags.
func (o joinOptions) starter(in invitation) (s starter, err error) {
	s = starter{TrustDomain: in.TrustDomain.Name(), Agent: in.Agent, Issuers: quotedList(in.Issuers), Outbound: o.outbound, App: o.app, Inbound: o.listen, Advertise: o.advertise}
	if o.data == "" {
		o.data = filepath.Join(defaultData, in.Agent)
	}
	var errDir, errData error
	s.Dir, errDir = absolute("--dir", o.dir)
	s.Data, errData = absolute("--data", o.data)
	if err := errors.Join(errDir, errData); err != nil {
		return s, err
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	address := func(flag, a string, loopback bool) netip.AddrPort {
		if a == "" {
			return netip.AddrPort{}
		}
		at, err := netip.ParseAddrPort(a)
		switch {
		case err != nil:
			bad("%s: %q is not address:port", flag, a)
		case loopback && !at.Addr().IsLoopback():
			bad("%s: %s is not a loopback address", flag, a)
		}
		return at
	}
	address("--outbound", o.outbound, true)
	switch {
	case o.gateway:
		if o.app != "" || o.advertise != "" {
			bad("--gateway goes without --app and --advertise")
		}
		if len(o.resolvers) == 0 {
			bad("--resolver: missing; name the DNS servers that the gateway asks, such as 192.0.2.53:53")
		}
		for _, r := range o.resolvers {
			address("--resolver", r, false)
		}
		if s.Listen = o.listen; s.Listen == "" {
			s.Listen = defaultGateway
		}
		address("--listen", s.Listen, false)
		s.Resolvers = quotedList(o.resolvers)
	case o.app == "":
		if o.listen != "" || o.advertise != "" {
			bad("--listen and --advertise go with --app, or with --gateway")
		}
	default:
		address("--app", o.app, true)
		if s.Inbound == "" {
			s.Inbound = defaultInbound
		}
		if at := address("--listen", s.Inbound, false); at.Addr().IsUnspecified() && o.advertise == "" {
			bad("--advertise: missing; name the address at which peers reach %s, such as 10.0.0.7:%d", s.Inbound, at.Port())
		}
		address("--advertise", o.advertise, false)
	}
	if !o.gateway && len(o.resolvers) > 0 {
		bad("--resolver goes with --gateway")
	}
	if err := errors.Join(errs...); err != nil {
		return s, usage(err)
	}
	return s, nil
}

// joinBy meets the issuer, and writes what the node needs.
func (c *cli) joinBy(ctx context.Context, in invitation, o joinOptions) error {
	s, err := o.starter(in)
	if err != nil {
		return err
	}
	kind := "sidecar"
	if o.gateway {
		kind = "gateway"
	}
	n := &newFiles{dir: s.Dir, closed: []string{s.Data}}
	if err := n.ownedBy(o.user); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, introducedWithin)
	defer cancel()
	bundle, err := control.Introduce(ctx, in.introduction())
	if errors.Is(err, control.ErrUnreachable) {
		return daemon.Hint(daemon.Exit(daemon.Unreachable, err), "see that the issuer runs, and that "+strings.Join(in.Issuers, ", ")+" is reached from here")
	}
	if err != nil {
		return daemon.Hint(daemon.Exit(daemon.Failed, err), "make a new invitation at the issuer: sallyport token create "+in.Agent+" --join "+in.Issuers[0])
	}
	n.files = []newFile{
		{filepath.Join(s.Dir, "bundle.pem"), certificates(bundle.X509), 0o644},
		{filepath.Join(s.Dir, "join-token"), []byte(in.Token + "\n"), 0o600},
	}
	if err := s.add(n, kind+".yaml", kind+".yaml"); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(s.Data, "node.json")); err == nil {
		return daemon.Hint(daemon.Exit(daemon.Failed, fmt.Errorf("a node has its identity in %s already, and nothing was written", s.Data)), "name another directory with --data")
	}
	if err := n.write(); err != nil {
		return err
	}
	next := kind + " run --config " + filepath.Join(s.Dir, kind+".yaml")
	if !o.gateway {
		next += " -- PROGRAM ARGS"
	}
	return c.printWritten(n, s.TrustDomain, []string{next})
}
