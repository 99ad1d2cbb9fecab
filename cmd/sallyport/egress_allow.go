package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/review"
)

// An allowance is a row that somebody wants for a time.
type allowance struct {
	dir, td, reason string
	until           time.Time
	call            authz.Call
}

// egressAllow is "sallyport egress allow".
func (c *cli) egressAllow() *cobra.Command {
	var a allowance
	var until string
	cmd := &cobra.Command{
		Use: "allow SPIFFE-ID HOST[:PORT]", Short: "Write a row that lets a workload out to a host for a time", Args: cobra.ExactArgs(2),
		Long: "Write a row that lets a workload out to a host for a time, with the reason above\n" +
			"it, at the end of access.csv in a folder of policy files. It changes nothing in\n" +
			"force: the file is for people to review, and for policy push. A row that would\n" +
			"not help, since a deny stands against it or another allows it, is not written.",
		RunE: func(_ *cobra.Command, args []string) error {
			if err := a.parse(args[0], args[1], until, time.Now()); err != nil {
				return usage(err)
			}
			row, err := a.write()
			if err != nil {
				return err
			}
			if c.format == "json" {
				return c.emit(map[string]string{"file": a.file(), "row": row}, nil, nil)
			}
			fmt.Fprintf(c.stdout, "%s\nwritten to %s; next: review it, sallyport policy lint %s, and sallyport policy push\n", row, a.file(), a.dir)
			return nil
		},
	}
	cmd.Flags().StringVar(&a.dir, "policies", "", "the folder of policy files; required")
	cmd.Flags().StringVar(&a.td, "trust-domain", "", "the trust domain (default: that of the first service)")
	cmd.Flags().StringVar(&until, "until", "", "when it ends: a time like 2026-01-02T15:04:05Z, or a duration like 72h from now; required")
	cmd.Flags().StringVar(&a.reason, "reason", "", "why, one line for who reviews it; required")
	return cmd
}

func (a *allowance) file() string { return filepath.Join(a.dir, "access.csv") }

// parse reads what is wanted, and reports the first mistake.
func (a *allowance) parse(src, to, until string, now time.Time) error {
	id, err := spiffeid.FromString(src)
	if err != nil {
		return fmt.Errorf("%q is no SPIFFE ID: %w", src, err)
	}
	host, port, err := net.SplitHostPort(to)
	if err != nil {
		host, port = to, "443"
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return fmt.Errorf("%q is not HOST or HOST:PORT, with a port from 1 to 65535", to)
	}
	host = strings.ToLower(host)
	if err := mesh.CheckHost(host); err != nil {
		return fmt.Errorf("%w; an address takes a row and a destination written by hand", err)
	}
	switch {
	case a.dir == "":
		return errors.New("--policies is missing: name the folder of policy files")
	case strings.TrimSpace(a.reason) == "":
		return errors.New("--reason is missing: say why, for who reviews the row")
	case strings.ContainsFunc(a.reason, unicode.IsControl):
		return errors.New("--reason holds a control character: write one line")
	case len(a.reason) > 200:
		return fmt.Errorf("--reason has %d bytes, more than 200", len(a.reason))
	case until == "":
		return errors.New("--until is missing: say when the row ends")
	}
	if d, err := time.ParseDuration(until); err == nil {
		a.until = now.Add(d)
	} else if a.until, err = time.Parse(time.RFC3339, until); err != nil {
		return fmt.Errorf("--until: %q is neither a duration like 72h nor a time like 2026-01-02T15:04:05Z", until)
	}
	if a.until = a.until.UTC().Truncate(time.Second); !a.until.After(now) {
		return fmt.Errorf("--until: %s is over", a.until.Format(time.RFC3339))
	}
	a.call = authz.Call{Dir: mesh.Out, Src: id, Dst: "host:" + host, Port: uint16(n), Verb: "CONNECT", Path: "-", Now: now}
	return nil
}

// write appends the row, once it is seen to be good and to help, in one step.
func (a *allowance) write() (row string, err error) {
	p, err := parsePolicies(a.dir, a.td)
	if err != nil {
		return "", err
	}
	host := strings.TrimPrefix(a.call.Dst, "host:")
	ways := mesh.Snapshot{Destinations: p.Destinations}
	switch how, found := ways.DestinationOf(host); {
	case how.Proto == mesh.ProtoHTTP:
		return "", usage(fmt.Errorf("nothing is written: %s is asked request by request, so its row names methods and paths: write it by hand", host))
	case !found || how.Proto == "" || how.Proto == mesh.ProtoTLS:
		a.call.SNI = host // what a tunnel of TLS must then say
	}
	x, err := review.Explain(p, &a.call)
	switch {
	case err != nil:
	case x.Allow:
		err = fmt.Errorf("row %s (%s) allows it already", x.Rule, x.Origin)
	case x.Add == "":
		err = errors.New(x.NoAdd)
	}
	if err != nil {
		return "", &daemon.ExitError{Code: daemon.Failed, Err: fmt.Errorf("nothing is written: %w", err)}
	}
	fields := strings.Split(x.Add, ", ")
	cond := &fields[len(fields)-2]
	*cond = strings.TrimPrefix(*cond+" until="+a.until.Format(time.RFC3339), "- ")
	row = strings.Join(fields, ", ")
	before, err := os.ReadFile(a.file())
	if err != nil {
		return "", usage(err)
	}
	after := bytes.Clone(before)
	if len(after) > 0 && !bytes.HasSuffix(after, []byte("\n")) {
		after = append(after, '\n')
	}
	after = fmt.Appendf(after, "\n# Until %s: %s\n%s\n", a.until.Format(time.DateOnly), a.reason, row)
	return row, a.replace(after)
}

// replace puts the file in place, if the folder with it is good and allows the
// call.
func (a *allowance) replace(text []byte) error {
	try, err := os.MkdirTemp("", "sallyport-allow-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(try)
	if err := os.CopyFS(filepath.Join(try, "p"), os.DirFS(a.dir)); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(try, "p", "access.csv"), text, 0o600); err != nil {
		return err
	}
	p, err := parsePolicies(filepath.Join(try, "p"), a.td)
	if err != nil {
		return err
	}
	if x, err := review.Explain(p, &a.call); err != nil || !x.Allow {
		return &daemon.ExitError{Code: daemon.Failed, Err: errors.Join(errors.New("nothing is written: the row would not allow it"), err)}
	}
	mode := os.FileMode(0o644)
	if st, err := os.Stat(a.file()); err == nil {
		mode = st.Mode().Perm()
	}
	next := a.file() + ".next"
	if err := errors.Join(os.WriteFile(next, text, mode), os.Chmod(next, mode)); err != nil {
		_ = os.Remove(next)
		return err
	}
	return os.Rename(next, a.file())
}
