package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// tls is "sallyport tls".
func (c *cli) tls() *cobra.Command {
	cmd := &cobra.Command{Use: "tls", Short: "Mutual TLS between two workloads"}
	cmd.AddCommand(&cobra.Command{
		Use: "check FROM TO", Short: "Have a sidecar make the real handshake with a service, and say how it went", Args: cobra.ExactArgs(2),
		Long: `Have the sidecar FROM, which is on this machine, make a handshake with every
endpoint of the service TO, as its calls do, and send nothing. FROM is the name
of its node, or its admin socket.

Exit code 0: every endpoint proved itself. 1: one did not, or there is none.`,
		Example: "  sallyport tls check web api",
		RunE: func(cmd *cobra.Command, args []string) error {
			socket, err := proxySocket(args[0])
			if err != nil {
				return err
			}
			name := strings.TrimSuffix(args[1], "."+mesh.Domain)
			var r mesh.HandshakeReport
			if err := queryProxy(cmd.Context(), http.MethodPost, socket, "/handshakes/"+url.PathEscape(name), &r); err != nil {
				return daemon.Hint(err, "sallyport policy can-reach, and services.yaml, name what may be called")
			}
			return c.printHandshakes(r, time.Now())
		},
	})
	return cmd
}

func (c *cli) printHandshakes(r mesh.HandshakeReport, now time.Time) error {
	wrong := 0
	for _, h := range r.Handshakes {
		if h.Err != "" {
			wrong++
		}
	}
	if c.format == "json" {
		if err := c.emit(r, nil, nil); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(c.stdout, "caller   %s, by a certificate that ends in %s\n", r.From, age(r.Expires.Sub(now)))
		fmt.Fprintf(c.stdout, "service  %s, where %s must prove itself; policy revision %d\n", r.Service, r.Identity, r.Revision)
		for _, h := range r.Handshakes {
			fmt.Fprintf(c.stdout, "\n%s\n%s", h.Address, handshakeText(h, now))
		}
	}
	switch {
	case len(r.Handshakes) == 0:
		return daemon.Hint(daemon.Exit(daemon.Failed, fmt.Errorf("no endpoint of %s is known: none of its sidecars is connected to the issuer", r.Service)), "sallyport status")
	case wrong > 0:
		return daemon.Exit(daemon.Failed, fmt.Errorf("%d of %d endpoints did not prove to be %s", wrong, len(r.Handshakes), r.Identity))
	}
	return nil
}

// handshakeText is one handshake in words.
func handshakeText(h mesh.Handshake, now time.Time) string {
	if h.Err != "" {
		return fmt.Sprintf("  FAILED: %s\n  next: %s\n", h.Err, handshakeFix(h.Err))
	}
	speaks := h.Protocol
	if speaks == "" {
		speaks = "a stream of bytes"
	}
	return fmt.Sprintf("  proved to be %s, by a certificate that ends in %s\n  %s, %s, keys by %s; speaks %s; took %s\n  it took the caller's certificate as well\n",
		h.Peer, age(h.Expires.Sub(now)), h.Version, h.Cipher, h.Exchange, speaks, h.Took.Round(100*time.Microsecond))
}

// handshakeFix says what usually is behind a failure.
func handshakeFix(err string) string {
	has := func(parts ...string) bool {
		for _, p := range parts {
			if strings.Contains(err, p) {
				return true
			}
		}
		return false
	}
	switch {
	case has("connection refused"):
		return "start the sidecar there; sallyport doctor on that machine says what keeps its doors closed"
	case has("timeout", "deadline", "no route", "unreachable"):
		return "let this machine reach that address, or correct inbound.advertise there"
	case has("server is "):
		return "another workload answers there: correct inbound.advertise of the one, or workload.identity of the other"
	case has("expired", "not yet valid"):
		return "sallyport doctor on both machines: SP003 (clock) and SP012 (identity)"
	case has("revoked"):
		return "it was revoked: sallyport revoke --help says how that ends"
	case has("remote error: tls:", "hung up"):
		return "the other side does not take the caller's certificate: sallyport doctor there, SP010 (bundle) and SP003 (clock)"
	case has("unknown authority", "chain"):
		return "the two do not have the same roots: sallyport ca status, and sallyport doctor on both machines"
	}
	return "sallyport doctor on both machines"
}

// id is "sallyport id".
func (c *cli) id() *cobra.Command {
	var proxy string
	cmd := &cobra.Command{
		Use: "id", Short: "Show which identity the sidecars on this machine serve", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			sockets, err := oneOrAll(proxy)
			if err != nil {
				return err
			}
			var all []mesh.IdentityReport
			rows := make([][]string, 0, len(sockets))
			for _, s := range sockets {
				var r mesh.IdentityReport
				if err := queryProxy(cmd.Context(), http.MethodGet, s, "/identity", &r); err != nil {
					return err
				}
				all = append(all, r)
				rows = append(rows, identityRow(r))
			}
			return c.emit(all, identityHeader, rows)
		},
	}
	cmd.PersistentFlags().StringVar(&proxy, "proxy", "", "the name of its node or the admin socket of one sidecar (default: all on this machine)")
	cmd.AddCommand(&cobra.Command{
		Use: "explain PID", Short: "Say which identity a process may have, by which selectors and entry, or why none", Args: cobra.ExactArgs(1),
		Long: `Say which identity a process on this machine may have: what its sidecar finds
to be true of it (selectors), and for each entry of the node which selectors
hold and which do not. Nothing is handed out.

Exit code 0: it has an identity. 1: it has none.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			sockets, err := oneOrAll(proxy)
			if err != nil {
				return err
			}
			if len(sockets) > 1 {
				return usage(fmt.Errorf("there are %d sidecars on this machine: name one with --proxy", len(sockets)))
			}
			var r mesh.ProcessReport
			if err := queryProxy(cmd.Context(), http.MethodGet, sockets[0], "/identity/"+url.PathEscape(args[0]), &r); err != nil {
				return err
			}
			return c.printProcess(r)
		},
	})
	return cmd
}

var identityHeader = []string{"IDENTITY", "ENDS", "PARENT", "ENTRY", "SERIAL"}

func identityRow(r mesh.IdentityReport) []string {
	return []string{r.Identity.String(), expiry(r.Expires), r.Parent.Path(), r.Entry, r.Serial}
}

// oneOrAll are the sockets that --proxy means.
func oneOrAll(proxy string) ([]string, error) {
	if proxy != "" {
		s, err := proxySocket(proxy)
		return []string{s}, err
	}
	all := localProxies()
	if len(all) == 0 {
		return nil, usage(errors.New("no sidecar is found on this machine: name its admin socket with --proxy"))
	}
	return all, nil
}

// printProcess explains in words.
func (c *cli) printProcess(r mesh.ProcessReport) error {
	given := 0
	for _, e := range r.Entries {
		if e.Given() {
			given++
		}
	}
	if c.format == "json" {
		if err := c.emit(r, nil, nil); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(c.stdout, "process    %d, %s, user %d\n", r.PID, r.Exe, r.UID)
		for _, s := range r.Selectors {
			fmt.Fprintf(c.stdout, "selector   %s\n", s)
		}
		for _, e := range r.Entries {
			c.printEntryReport(e, r)
		}
	}
	switch {
	case len(r.Entries) == 0:
		return daemon.Hint(daemon.Exit(daemon.Failed, errors.New("no entry names this node as its parent")), "sallyport entry list; entries.yaml names the agent as parent_id")
	case given == 0:
		return daemon.Exit(daemon.Failed, fmt.Errorf("process %d has no identity: no entry of this node fits it", r.PID))
	}
	return nil
}

func (c *cli) printEntryReport(e mesh.EntryReport, r mesh.ProcessReport) {
	said := "NO: it lacks " + strings.Join(e.Misses, ", ")
	switch {
	case e.Given() && e.SPIFFEID == r.Served:
		said = "yes, and its calls go out as this"
	case e.Given():
		said = "yes, from the Workload API"
	case len(e.Has)+len(e.Misses) == 0:
		said = "NO: the entry has no selectors"
	}
	fmt.Fprintf(c.stdout, "\n%s (entry %s)\n  %s\n", e.SPIFFEID, e.ID, said)
	for _, s := range e.Has {
		fmt.Fprintf(c.stdout, "  holds      %s\n", s)
	}
	for _, s := range e.Misses {
		fmt.Fprintf(c.stdout, "  holds not  %s\n", s)
	}
}
