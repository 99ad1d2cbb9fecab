package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/conform"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

// conform is "sallyport conform".
func (c *cli) conform() *cobra.Command {
	cmd := &cobra.Command{
		Use: "conform", Short: "Check an implementation against the SPIFFE specifications", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.conformWorkload(), c.conformServer(), c.conformDomain())
	return cmd
}

// conformWorkload is "sallyport conform workload-api".
func (c *cli) conformWorkload() *cobra.Command {
	var w conform.Workload
	var domain string
	var only bool
	cmd := &cobra.Command{
		Use:   "workload-api",
		Short: "Check a Workload API, as the workload that this runs as",
		Long: "Check a Workload API against the 134 demands of the SPIFFE specifications,\n" +
			"as far as a workload can see them. Run it as a process that has an identity,\n" +
			"such as: sidecar run --config FILE -- sallyport conform workload-api\n\n" +
			"With --domain it also lies to the validator, in the name of a throw-away\n" +
			"trust domain that sallyport conform domain made and that the workload's\n" +
			"entry federates with.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if w.Address == "" {
				return usage(errors.New("no socket is given, and SPIFFE_ENDPOINT_SOCKET is not set: use --socket"))
			}
			if _, err := conform.Target(w.Address); err != nil {
				return usage(err)
			}
			var err error
			if w.Domain, err = loadDomain(domain); err != nil {
				return err
			}
			got, err := conform.RunWorkload(cmd.Context(), w)
			if err != nil {
				return daemon.Hint(&daemon.ExitError{Code: daemon.Unreachable, Err: err}, "run it as a workload that has an identity there")
			}
			return c.printVerdicts("conform workload-api", got, only)
		},
	}
	f := cmd.Flags()
	f.StringVar(&w.Address, "socket", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "the Workload API's address, such as unix:///run/agent.sock")
	f.StringVar(&domain, "domain", "", "the folder of a throw-away trust domain that the workload federates with")
	f.DurationVar(&w.Wait, "wait", 0, "how long to wait for a second message of a stream")
	f.BoolVar(&only, "json", false, "print the last line alone")
	return cmd
}

// conformServer is "sallyport conform server".
func (c *cli) conformServer() *cobra.Command {
	var f serverFlags
	var only bool
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Check a SPIRE Server API and what it publishes",
		Long: "Check a SPIRE Server API, its bundle endpoint and its OIDC provider against\n" +
			"the 134 demands of the SPIFFE specifications, as far as a client can see them.\n\n" +
			"With --socket (or --svid and --key) SVIDs are minted, right and wrong, and\n" +
			"what is made for the check is taken away again: a node, an entry, federations\n" +
			"under conform.example. With --listen the server also follows a bundle endpoint\n" +
			"of the check's own, which lies to it.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.server(cmd.Flags().Changed("socket"), c.socket)
			if err != nil {
				return err
			}
			got, err := conform.RunServer(cmd.Context(), s)
			if err != nil {
				return daemon.Hint(&daemon.ExitError{Code: daemon.Unreachable, Err: err}, "name the server's address with --address HOST:PORT")
			}
			return c.printVerdicts("conform server", got, only)
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&only, "json", false, "print the last line alone")
	return cmd
}

// serverFlags are those of "sallyport conform server".
type serverFlags struct {
	s                                              conform.Server
	bundle, webRoots, svid, key, tokenFile, domain string
}

func (f *serverFlags) add(cmd *cobra.Command) {
	p := cmd.Flags()
	p.StringVar(&f.s.Address, "address", "", "host:port of the API for agents")
	p.StringVar(&f.bundle, "bundle", "", "PEM file with the roots that verify the server; default: those it names itself")
	p.StringVar(&f.svid, "svid", "", "PEM file with the SVID of an administrator, in place of --socket")
	p.StringVar(&f.key, "key", "", "PEM file with its key")
	p.StringVar(&f.tokenFile, "join-token-file", "", "file with a join token, to attest as a node without an operator's rights")
	p.StringVar(&f.s.BundleEndpoint, "bundle-endpoint", "", "URL of the bundle document")
	p.StringVar(&f.s.OIDC, "oidc", "", "URL of the OIDC issuer")
	p.StringVar(&f.webRoots, "web-roots", "", "PEM file with the authorities of the two URLs; default: those of the system")
	p.StringVar(&f.s.Listen, "listen", "", "host:port at which the server can reach this check")
	p.StringVar(&f.domain, "domain", "", "the folder of a throw-away trust domain that the server already follows at --listen")
}

// server reads the files that the flags name.
func (f *serverFlags) server(operator bool, socket string) (conform.Server, error) {
	s := f.s
	if operator {
		s.Operator = socket
	}
	if err := s.Validate(); err != nil {
		return s, usage(err)
	}
	if (f.svid == "") != (f.key == "") {
		return s, usage(errors.New("--svid and --key belong together"))
	}
	var err error
	if s.Domain, err = loadDomain(f.domain); err != nil {
		return s, err
	}
	if f.svid != "" {
		pair, err := tls.LoadX509KeyPair(f.svid, f.key)
		if err != nil {
			return s, usage(fmt.Errorf("--svid: %w", err))
		}
		s.Admin = &pair
	}
	if f.tokenFile != "" {
		b, err := os.ReadFile(f.tokenFile)
		if err != nil {
			return s, usage(fmt.Errorf("--join-token-file: %w", err))
		}
		s.JoinToken = strings.TrimSpace(string(b))
	}
	if f.bundle != "" {
		if s.Roots, err = readCertificates(f.bundle); err != nil {
			return s, usage(fmt.Errorf("--bundle: %w", err))
		}
	}
	if f.webRoots != "" {
		certs, err := readCertificates(f.webRoots)
		if err != nil {
			return s, usage(fmt.Errorf("--web-roots: %w", err))
		}
		s.WebRoots = x509.NewCertPool()
		for _, c := range certs {
			s.WebRoots.AddCert(c)
		}
	}
	return s, nil
}

// readCertificates reads a PEM file that has nothing but certificates.
func readCertificates(file string) ([]*x509.Certificate, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	certs, err := control.ParseBundle(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return certs, nil
}

// conformDomain is "sallyport conform domain".
func (c *cli) conformDomain() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "domain FOLDER",
		Short: "Make a throw-away trust domain for the other checks",
		Long: "Make a throw-away trust domain: its keys, and bundle.json, with which the\n" +
			"implementation under test is to federate. What its keys sign is accepted by\n" +
			"whoever federates with it: end the federation after the check.",
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			td, err := spiffeid.TrustDomainFromString(name)
			if err != nil {
				return usage(fmt.Errorf("--trust-domain: %w", err))
			}
			d, err := conform.NewDomain(td)
			if err != nil {
				return err
			}
			if err := d.Save(args[0]); err != nil {
				return daemon.Hint(fmt.Errorf("keep the trust domain: %w", err), "name a folder that has no trust domain yet")
			}
			fmt.Fprintf(c.stdout, "%s is made, valid for 30 days; federate with %s\n", td.Name(), filepath.Join(args[0], conform.BundleFile))
			return nil
		},
	}
	cmd.Flags().StringVar(&name, "trust-domain", "conform.example", "its name")
	return cmd
}

// loadDomain reads a throw-away trust domain, if one is named.
func loadDomain(dir string) (*conform.Domain, error) {
	if dir == "" {
		return nil, nil
	}
	d, err := conform.LoadDomain(dir)
	if err != nil {
		return nil, daemon.Hint(&daemon.ExitError{Code: daemon.Usage, Err: fmt.Errorf("--domain: %w", err)}, "make one with: sallyport conform domain FOLDER")
	}
	return d, nil
}

// A conformVerdict is one demand in the last line.
type conformVerdict struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// printVerdicts prints a table and, as the last line, the result as JSON. A
// demand that could not be looked at is no failure; its detail says why.
func (c *cli) printVerdicts(name string, got []conform.Verdict, only bool) error {
	var cases struct {
		Tried   int `json:"tried"`
		Passed  int `json:"passed"`
		Failed  int `json:"failed"`
		Skipped int `json:"skipped"`
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	verdicts := []conformVerdict{}
	for _, v := range got {
		word, detail := "pass", ""
		cases.Tried++
		switch {
		case v.Skipped != "":
			word, detail = "not applicable", "not applicable: "+v.Skipped
			cases.Tried--
			cases.Skipped++
		case v.Err != nil:
			word, detail = "FAIL", strings.ReplaceAll(v.Err.Error(), "\n", "; ")
			cases.Failed++
		default:
			cases.Passed++
		}
		verdicts = append(verdicts, conformVerdict{fmt.Sprintf("%d %s", v.Must.Number, v.Must.Says), v.Err == nil, detail})
		if !only {
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\n", v.Must.Number, word, v.Must.Says, strings.TrimPrefix(detail, "not applicable: "))
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	ok := cases.Failed == 0 && cases.Passed > 0
	line, err := json.Marshal(map[string]any{"name": name, "ok": ok, "cases": cases, "verdicts": verdicts})
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "%s\n", line)
	if !ok {
		return &daemon.ExitError{Code: daemon.Failed, Err: fmt.Errorf("%d of %d demands are not met", cases.Failed, cases.Tried)}
	}
	return nil
}
