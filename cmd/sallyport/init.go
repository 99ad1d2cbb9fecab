package main

import (
	"crypto/rand"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Where a packaged installation has its configuration, its state and its
// sockets.
const (
	defaultDir  = "/etc/sallyport"
	defaultData = "/var/lib/sallyport"
	defaultRun  = "/run/sallyport"
)

// adminPath is the identity of the first admin, in every trust domain.
const adminPath = "/ns/ops/sa/admin"

// initialize is "sallyport init".
func (c *cli) initialize() *cobra.Command {
	var s starter
	var owner string
	cmd := &cobra.Command{
		Use: "init TRUST-DOMAIN", Short: "Write the configuration of a new trust domain", Args: cobra.ExactArgs(1),
		Long: `Write what a new trust domain begins with: the issuer's configuration and the
passphrase of its CA keys, which the issuer makes at its first start; policies
to begin with, under which spiffe://TRUST-DOMAIN` + adminPath + ` may do all
that an operator may; and what nodes are configured with, to be read. Nothing
that is there already is replaced.

Nodes join with: sallyport token create NODE --join HOST:PORT, and there
sallyport join.`,
		Example: "  sallyport init corp.example --issuer issuer.corp.example:8443",
		RunE: func(_ *cobra.Command, args []string) error {
			td, err := spiffeid.TrustDomainFromString(args[0])
			if err != nil || strings.Contains(args[0], "/") {
				return usage(fmt.Errorf("%q is no name of a trust domain; write one such as corp.example", args[0]))
			}
			s.TrustDomain = td.Name()
			files, err := s.domain()
			if err != nil {
				return err
			}
			if err := files.ownedBy(owner); err != nil {
				return err
			}
			if err := files.write(); err != nil {
				return err
			}
			return c.printWritten(files, s.TrustDomain, s.nextOfDomain())
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.Dir, "dir", defaultDir, "the directory of the configuration")
	f.StringVar(&s.Data, "data", defaultData, "the directory of the state; the issuer's is issuer in it")
	f.StringVar(&s.Listen, "listen", "0.0.0.0:8443", "where the issuer listens for proxies")
	f.StringVar(&s.Issuer, "issuer", "", "host:port at which proxies reach it (default: the name of this machine)")
	f.StringVar(&owner, "user", "", "who is to own the files: the user that the issuer runs as (default: who runs this)")
	return cmd
}

// domain are the files of a new trust domain.
func (s *starter) domain() (*newFiles, error) {
	_, port, err := net.SplitHostPort(s.Listen)
	if err != nil {
		return nil, usage(fmt.Errorf("--listen: %q is not host:port", s.Listen))
	}
	if s.Issuer == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, usage(fmt.Errorf("the name of this machine is unknown, name it with --issuer: %w", err))
		}
		s.Issuer = net.JoinHostPort(host, port)
	}
	if err := checkDial(s.Issuer); err != nil {
		return nil, usage(fmt.Errorf("--issuer: %w", err))
	}
	if s.Dir, err = absolute("--dir", s.Dir); err != nil {
		return nil, err
	}
	if s.Data, err = absolute("--data", s.Data); err != nil {
		return nil, err
	}
	s.Run = filepath.Join(s.Data, "issuer", "run")
	if s.Data == defaultData {
		s.Run = filepath.Join(defaultRun, "issuer")
	}
	n := &newFiles{dir: s.Dir, closed: []string{filepath.Join(s.Data, "issuer")}}
	n.files = append(n.files, newFile{filepath.Join(s.Dir, "ca.passphrase"), []byte(rand.Text() + "\n"), 0o600})
	if err := s.add(n, "issuer.yaml", "issuer.yaml"); err != nil {
		return nil, err
	}
	err = fs.WalkDir(starterFS, "starter/policies", func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name := strings.TrimPrefix(p, "starter/")
		return s.add(n, name, name)
	})
	if err != nil {
		return nil, err
	}
	for _, kind := range []string{"sidecar", "gateway"} {
		node := starter{
			TrustDomain: s.TrustDomain, Dir: s.Dir, Data: path.Join(s.Data, kind), Issuers: quotedList([]string{s.Issuer}),
			Listen: defaultGateway, Outbound: defaultOutbound, Resolvers: quotedList([]string{"192.0.2.53:53"}),
		}
		if err := node.add(n, kind+".yaml", "nodes/"+kind+".yaml"); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// add renders a file to be written into Dir.
func (s starter) add(n *newFiles, from, to string) error {
	b, err := s.render(from)
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	n.files = append(n.files, newFile{filepath.Join(s.Dir, to), b, 0o644})
	return nil
}

// nextOfDomain are the commands that bring the trust domain up.
func (s starter) nextOfDomain() []string {
	socket := ""
	if s.Data != defaultData {
		socket = " --socket " + filepath.Join(s.Run, "api.sock")
	}
	return []string{
		"issuer run --config " + filepath.Join(s.Dir, "issuer.yaml"),
		"sallyport svid mint spiffe://" + s.TrustDomain + adminPath + " --ttl 12h --write ~/.sallyport/admin" + socket,
		"sallyport token create web --join " + s.Issuer + socket,
	}
}

// printWritten says what is there now, and what to do next.
func (c *cli) printWritten(n *newFiles, td string, next []string) error {
	paths := make([]string, len(n.files))
	for i, f := range n.files {
		paths[i] = f.path
	}
	if c.format == "json" {
		return c.emit(map[string]any{"trust_domain": td, "files": paths, "next": next}, nil, nil)
	}
	for _, p := range paths {
		fmt.Fprintln(c.stdout, p)
	}
	fmt.Fprintln(c.stdout, "\nnext:")
	for _, cmd := range next {
		fmt.Fprintln(c.stdout, "  "+cmd)
	}
	return nil
}
