package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/authz"
	"sallyport/internal/gatewayapi"
	"sallyport/internal/mesh"
	"sallyport/internal/review"
)

// route is "sallyport route".
func (c *cli) route() *cobra.Command {
	cmd := &cobra.Command{Use: "route", Short: "Say where calls go, and what an edit of routes changes"}
	var td string
	cmd.PersistentFlags().StringVar(&td, "trust-domain", "", "the trust domain (default: that of the first service)")
	cmd.AddCommand(c.routeExplain(&td), c.routeDiff(&td), c.routeImport())
	return cmd
}

// routeExplain is "sallyport route explain".
func (c *cli) routeExplain(td *string) *cobra.Command {
	var q struct {
		from, to, at, addr string
		fields, claims     []string
	}
	cmd := &cobra.Command{
		Use:   "explain DIR METHOD PATH",
		Short: "Say which route a call takes to which backend, why, and the row that allows it",
		Long: "Say which route a call takes to which backend, why, and the row that allows it:\n\n" +
			"  sallyport route explain policies --from web --to billing GET '/v1/charges?currency=eur' -H 'X-Canary: 1'",
		Args: cobra.ExactArgs(3),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := parsePolicies(args[0], *td)
			if err != nil {
				return err
			}
			rq := review.RouteQuery{Call: &authz.Call{Dir: mesh.In, Verb: args[1], Path: args[2], Now: time.Now()}, Fields: q.fields}
			if q.at != "" {
				if rq.Call.Now, err = time.Parse(time.RFC3339, q.at); err != nil {
					return usage(fmt.Errorf("--at: %q is not a time such as 2026-11-27T10:00:00Z", q.at))
				}
			}
			if q.addr != "" {
				if rq.Addr, err = netip.ParseAddr(q.addr); err != nil {
					return usage(fmt.Errorf("--address: %q is not an address", q.addr))
				}
			}
			if rq.Claims, err = pairs(q.claims); err != nil {
				return usage(err)
			}
			if rq.Call.Src, err = review.Caller(p, q.from); err != nil {
				return usage(fmt.Errorf("--from: %w", err))
			}
			name, _, err := p.Target(mesh.Case{To: q.to})
			if err != nil || name != mesh.In || !isService(p, q.to) {
				return usage(fmt.Errorf("--to: %q is no service: calls to hosts outside are tunnels, whose route nobody sees into", q.to))
			}
			if !strings.HasPrefix(args[2], "/") && args[2] != "-" {
				return usage(fmt.Errorf("path %q does not start with \"/\"", args[2]))
			}
			rq.Service = mesh.ServiceName(q.to)
			x, err := review.ExplainRoute(p, rq)
			if err != nil {
				return failed(err)
			}
			if c.format == "json" {
				return c.emit(x, nil, nil)
			}
			writeRouted(c.stdout, &x)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.from, "from", "", "the service or SPIFFE ID that calls (required)")
	f.StringVar(&q.to, "to", "", "the service that is called (required)")
	f.StringArrayVarP(&q.fields, "header", "H", nil, "a header field, \"NAME: VALUE\"; may be repeated")
	f.StringArrayVar(&q.claims, "claim", nil, "a claim of the verified token, NAME=VALUE; may be repeated")
	f.StringVar(&q.addr, "address", "", "where the call comes from, for regions")
	f.StringVar(&q.at, "at", "", "the time of the call (default: now)")
	return cmd
}

func isService(p *mesh.Policies, name string) bool {
	for i := range p.Services {
		if string(p.Services[i].Name) == name {
			return true
		}
	}
	return false
}

func pairs(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range list {
		name, value, ok := strings.Cut(s, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("--claim: %q is not NAME=VALUE", s)
		}
		out[name] = value
	}
	return out, nil
}

// writeRouted prints where a call goes.
func writeRouted(w io.Writer, x *review.Routed) {
	if x.Route == "" {
		fmt.Fprintf(w, "route    none: the call goes to %s itself\n", x.Service)
	} else {
		fmt.Fprintf(w, "route    %d of %s: %s (%s)\n", x.Number, x.Service, x.Route, x.Origin)
	}
	for _, s := range x.Steps {
		match := ""
		if s.Match > 0 {
			match = fmt.Sprintf(", match %d", s.Match)
		}
		what := "fits"
		if s.Fails != "" {
			what = s.Fails + " does not fit"
		}
		fmt.Fprintf(w, "tried    %s%s by %s: %s\n", s.Route, match, s.Path, what)
	}
	switch {
	case x.Answer != "":
		fmt.Fprintf(w, "answer   %s, by the caller's sidecar\n", x.Answer)
	case x.Backend != "" && x.Kept != "":
		fmt.Fprintf(w, "backend  %s, with which the caller stays by %s (of %s)\n", x.Backend, x.Kept, strings.Join(x.Backends, ", "))
	case x.Backend != "":
		fmt.Fprintf(w, "backend  %s\n", x.Backend)
	case len(x.Backends) > 0:
		fmt.Fprintf(w, "backend  by the trace: %s\n", strings.Join(x.Backends, ", "))
	}
	for _, line := range []struct{ name, text string }{{"path", x.Path}, {"host", x.Host}} {
		if line.text != "" {
			fmt.Fprintf(w, "%-8s %s\n", line.name, line.text)
		}
	}
	if x.Timeout > 0 {
		fmt.Fprintf(w, "timeout  %s\n", x.Timeout)
	}
	for _, f := range x.Faults {
		fmt.Fprintf(w, "fault    %s\n", f)
	}
	for _, s := range x.Shadows {
		fmt.Fprintf(w, "shadow   %s\n", s)
	}
	if x.Recorded != "" {
		fmt.Fprintf(w, "recorded %s\n", x.Recorded)
	}
	for i := range x.Judged {
		writeAccount(w, &x.Judged[i].Account)
	}
}

// routeImport is "sallyport route import".
func (c *cli) routeImport() *cobra.Command {
	var service, into string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Write HTTPRoute, GRPCRoute, TLSRoute and TCPRoute documents as files of policies/routes",
		Long: "Write HTTPRoute, GRPCRoute, TLSRoute and TCPRoute documents of the Gateway API as\n" +
			"files of policies/routes. A document is of the Service in its parentRefs, or of\n" +
			"its host name in mesh.internal, unless --service says another.",
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			b, err := os.ReadFile(args[0])
			if err != nil {
				return usage(err)
			}
			files, err := gatewayapi.Import(args[0], b, mesh.ServiceName(service))
			if err != nil {
				return failed(err)
			}
			for i := range files {
				if into == "" {
					fmt.Fprintf(c.stdout, "# routes/%s.yaml\n%s", files[i].Service, files[i].EncodeYAML())
					continue
				}
				name := filepath.Join(into, string(files[i].Service)+".yaml")
				f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
				if err != nil {
					return failed(err) // never over what somebody has reviewed
				}
				_, err = f.Write(files[i].EncodeYAML())
				if err = errors.Join(err, f.Close()); err != nil {
					return failed(err)
				}
				fmt.Fprintln(c.stdout, name)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&service, "service", "", "the service whose calls the routes are about")
	cmd.Flags().StringVar(&into, "write", "", "write new files into this folder instead")
	return cmd
}

// routeDiff is "sallyport route diff".
func (c *cli) routeDiff(td *string) *cobra.Command {
	return &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Show which routes NEW changes, and what part of the callers goes elsewhere",
		Args:  cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			was, err := parsePolicies(args[0], *td)
			if err != nil {
				return fmt.Errorf("old policies: %w", err)
			}
			is, err := parsePolicies(args[1], *td)
			if err != nil {
				return err
			}
			changes, err := review.DiffRoutes(was, is)
			if err != nil {
				return failed(err)
			}
			if c.format == "json" {
				if changes == nil {
					changes = []review.RouteChange{}
				}
				return c.emit(changes, nil, nil)
			}
			for i := range changes {
				writeRouteChange(c.stdout, &changes[i])
			}
			fmt.Fprintf(c.stdout, "%s changed\n", count(len(changes), "route"))
			return nil
		},
	}
}

func writeRouteChange(w io.Writer, x *review.RouteChange) {
	name := x.Of
	if x.Route != "" {
		name += "/" + x.Route
	}
	fmt.Fprintf(w, "%-9s  %s\n", x.What, name)
	if len(x.Was)+len(x.Is) > 0 && strings.Join(x.Was, ", ") != strings.Join(x.Is, ", ") {
		fmt.Fprintf(w, "           calls: %s, was %s\n", orNone(x.Is), orNone(x.Was))
	}
	if x.Moved > 0 {
		fmt.Fprintf(w, "           moves %.1f%% of the callers\n", float64(x.Moved)/100)
	}
	for _, f := range x.Fields {
		fmt.Fprintf(w, "           %s\n", fieldText(x.What, f, func(s string) string { return s }))
	}
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}
