package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// failed is the error of a call: that no issuer answered, or what it answered.
func (c *cli) failed(err error, next string) error {
	if errors.Is(err, control.ErrUnreachable) {
		return c.unreachable(err)
	}
	return daemon.Hint(&daemon.ExitError{Code: daemon.Failed, Err: err}, next)
}

// with runs f with a connection to the issuer.
func (c *cli) with(cmd *cobra.Command, next string, f func(context.Context, *control.Admin) error) error {
	a, err := c.admin()
	if err != nil {
		return err
	}
	defer a.Close()
	if err := f(cmd.Context(), a); err != nil {
		return c.failed(err, next)
	}
	return nil
}

func (c *cli) entryShow() *cobra.Command {
	return &cobra.Command{
		Use: "show ENTRY", Short: "Show one entry whole", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd, "sallyport entry list", func(ctx context.Context, a *control.Admin) error {
				e, err := a.Entry(ctx, args[0])
				if err != nil {
					return err
				}
				return c.printEntry(e)
			})
		},
	}
}

func (c *cli) printEntry(e mesh.Entry) error {
	rows := [][]string{{"entry", e.ID}, {"identity", e.SPIFFEID.String()}, {"parent", e.ParentID.String()}}
	for _, s := range e.Selectors {
		rows = append(rows, []string{"selector", s.String()})
	}
	add := func(yes bool, name, value string) {
		if yes {
			rows = append(rows, []string{name, value})
		}
	}
	add(e.X509TTL > 0, "X.509-SVID life", e.X509TTL.String())
	add(e.JWTTTL > 0, "JWT-SVID life", e.JWTTTL.String())
	add(len(e.DNSNames) > 0, "DNS names", strings.Join(e.DNSNames, " "))
	add(e.Hint != "", "hint", e.Hint)
	add(e.Admin, "admin", "yes")
	add(e.Downstream, "downstream", "yes")
	add(!e.ExpiresAt.IsZero(), "ends", e.ExpiresAt.UTC().Format(time.RFC3339))
	if e.CreatedAt.IsZero() {
		add(true, "kept in", "a reviewed file")
	} else {
		add(true, "kept in", "the store, made "+e.CreatedAt.UTC().Format(time.RFC3339))
	}
	return c.emit(e, []string{"FIELD", "VALUE"}, rows)
}

func (c *cli) entryCreate() *cobra.Command {
	var (
		e           mesh.Entry
		parent      string
		selectors   []string
		expiresIn   time.Duration
		errSelector error
	)
	cmd := &cobra.Command{
		Use: "create SPIFFE-ID --parent AGENT --selector S...", Short: "Add an entry beside the reviewed files", Args: cobra.ExactArgs(1),
		Long: "Add an entry to the store. Prefer entries.yaml for what people should review;\n" +
			"a reviewed entry of the same parent, identity and selectors always holds.",
		RunE: func(cmd *cobra.Command, args []string) error {
			var errID, errParent error
			e.SPIFFEID, errID = spiffeid.FromString(args[0])
			e.ParentID, errParent = spiffeid.FromString(parent)
			for _, s := range selectors {
				sel, err := mesh.ParseSelector(s)
				errSelector = errors.Join(errSelector, err)
				e.Selectors = append(e.Selectors, sel)
			}
			if errParent != nil {
				errParent = fmt.Errorf("--parent: %w", errParent)
			}
			if err := errors.Join(errID, errParent, errSelector); err != nil {
				return usage(err)
			}
			if expiresIn > 0 {
				e.ExpiresAt = time.Now().Add(expiresIn)
			}
			return c.with(cmd, "sallyport entry list", func(ctx context.Context, a *control.Admin) error {
				made, err := a.CreateEntry(ctx, e)
				if err != nil {
					return err
				}
				return c.printEntry(made)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&e.ID, "id", "", "the entry's own name (default: made from what it says)")
	f.StringVar(&parent, "parent", "", "the SPIFFE ID of the agent, of an alias, or of the issuer to make an alias")
	f.StringArrayVar(&selectors, "selector", nil, "a fact that attestation must find, such as unix:uid:1000, or of nodes for an alias; all must hold")
	f.DurationVar(&e.X509TTL, "x509-ttl", 0, "the life of X.509-SVIDs (default: the issuer's)")
	f.DurationVar(&e.JWTTTL, "jwt-ttl", 0, "the life of JWT-SVIDs (default: the issuer's)")
	f.StringArrayVar(&e.DNSNames, "dns", nil, "a DNS name in the certificate")
	f.StringVar(&e.Hint, "hint", "", "what the identity is for")
	f.BoolVar(&e.Admin, "admin", false, "let the identity call what operators call")
	f.BoolVar(&e.Downstream, "downstream", false, "let the identity call what an issuer below calls")
	f.DurationVar(&expiresIn, "expires-in", 0, "how long the entry holds (default: until deleted)")
	return cmd
}

func (c *cli) entryDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete ENTRY", Short: "Remove an entry that a call has made", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd, "sallyport entry list", func(ctx context.Context, a *control.Admin) error {
				if err := a.DeleteEntry(ctx, args[0]); err != nil {
					return err
				}
				fmt.Fprintf(c.stderr, "entry %s is deleted\n", args[0])
				return nil
			})
		},
	}
}

// agent is "sallyport agent".
func (c *cli) agent() *cobra.Command {
	cmd := &cobra.Command{Use: "agent", Short: "The nodes that were attested"}
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List the attested nodes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd, "sallyport status", func(ctx context.Context, a *control.Admin) error {
				all, err := a.Agents(ctx)
				if err != nil {
					return err
				}
				return c.printAgents(all)
			})
		},
	})
	one := func(use, short string, f func(context.Context, *control.Admin, spiffeid.ID) error) {
		cmd.AddCommand(&cobra.Command{
			Use: use + " AGENT", Short: short, Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				id, err := spiffeid.FromString(args[0])
				if err != nil {
					return usage(fmt.Errorf("%q is not the SPIFFE ID of an agent: %w", args[0], err))
				}
				return c.with(cmd, "sallyport agent list", func(ctx context.Context, a *control.Admin) error { return f(ctx, a, id) })
			},
		})
	}
	one("show", "Show one node", func(ctx context.Context, a *control.Admin, id spiffeid.ID) error {
		g, err := a.Agent(ctx, id)
		if err != nil {
			return err
		}
		rows := [][]string{{"agent", g.ID.String()}, {"attested by", g.AttestationType}, {"serial", g.Serial},
			{"SVID ends", g.ExpiresAt.UTC().Format(time.RFC3339)}, {"banned", strconv.FormatBool(g.Banned)}}
		for _, s := range g.Selectors {
			rows = append(rows, []string{"selector", s.String()})
		}
		return c.emit(g, []string{"FIELD", "VALUE"}, rows)
	})
	one("ban", "End a node and keep it out until it is evicted", func(ctx context.Context, a *control.Admin, id spiffeid.ID) error {
		if err := a.BanAgent(ctx, id); err != nil {
			return err
		}
		fmt.Fprintf(c.stderr, "%s is banned; to lift the ban: sallyport agent evict %s\n", id, id)
		return nil
	})
	one("evict", "Forget a node and its ban: it may attest again", func(ctx context.Context, a *control.Admin, id spiffeid.ID) error {
		if err := a.EvictAgent(ctx, id); err != nil {
			return err
		}
		fmt.Fprintf(c.stderr, "%s is forgotten\n", id)
		return nil
	})
	return cmd
}

func (c *cli) printAgents(all []mesh.Agent) error {
	rows := make([][]string, 0, len(all))
	for _, g := range all {
		state := "active"
		if g.Banned {
			state = "BANNED"
		}
		rows = append(rows, []string{g.ID.String(), g.AttestationType, g.ExpiresAt.UTC().Format(time.RFC3339), state})
	}
	return c.emit(all, []string{"AGENT", "ATTESTED BY", "SVID ENDS", "STATE"}, rows)
}

// svid is "sallyport svid".
func (c *cli) svid() *cobra.Command {
	cmd := &cobra.Command{Use: "svid", Short: "Identities without a workload"}
	var (
		audience, dns []string
		ttl           time.Duration
		dir           string
	)
	mint := &cobra.Command{
		Use: "mint SPIFFE-ID", Short: "Mint one SVID outside of the entries", Args: cobra.ExactArgs(1),
		Long: "Mint an X.509-SVID, with a new key, into --write DIR (svid.pem, key.pem,\n" +
			"bundle.pem); with --audience a JWT-SVID, onto standard output. It is in the audit.",
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := spiffeid.FromString(args[0])
			if err != nil {
				return usage(err)
			}
			if len(audience) == 0 && dir == "" {
				return usage(errors.New("say where the key goes with --write DIR, or ask for a token with --audience"))
			}
			return c.with(cmd, "sallyport svid mint --help", func(ctx context.Context, a *control.Admin) error {
				if len(audience) == 0 {
					return c.mintX509(ctx, a, id, dns, ttl, dir)
				}
				token, expires, err := a.MintJWT(ctx, id, audience, ttl)
				if err != nil {
					return err
				}
				fmt.Fprintln(c.stdout, token)
				fmt.Fprintf(c.stderr, "for %s, until %s\n", id, expires.UTC().Format(time.RFC3339))
				return nil
			})
		},
	}
	mint.Flags().StringArrayVar(&audience, "audience", nil, "mint a JWT-SVID for this audience")
	mint.Flags().StringArrayVar(&dns, "dns", nil, "a DNS name in the certificate")
	mint.Flags().DurationVar(&ttl, "ttl", 0, "how long it holds (default: the issuer's)")
	mint.Flags().StringVar(&dir, "write", "", "the directory for svid.pem, key.pem and bundle.pem")
	cmd.AddCommand(mint)
	return cmd
}

func (c *cli) mintX509(ctx context.Context, a *control.Admin, id spiffeid.ID, dns []string, ttl time.Duration, dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}, DNSNames: dns}, key)
	if err != nil {
		return fmt.Errorf("make the request: %w", err)
	}
	chain, err := a.MintX509(ctx, csr, ttl)
	if err != nil {
		return err
	}
	bundle, err := a.Bundle(ctx, id.TrustDomain())
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode the key: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make --write: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{
		{"key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600},
		{"svid.pem", certificates(chain), 0o644},
		{"bundle.pem", certificates(bundle.X509), 0o644},
	} {
		if err := daemon.WriteFile(filepath.Join(dir, f.name), f.data, f.mode); err != nil {
			return err
		}
	}
	fmt.Fprintf(c.stderr, "%s is in %s, until %s\n", id, dir, chain[0].NotAfter.UTC().Format(time.RFC3339))
	return nil
}

func certificates(list []*x509.Certificate) []byte {
	var b []byte
	for _, x := range list {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: x.Raw})...)
	}
	return b
}
