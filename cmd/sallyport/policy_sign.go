package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/review"
)

// policyKey is "sallyport policy key".
func (c *cli) policyKey() *cobra.Command {
	return &cobra.Command{
		Use: "key FILE", Short: "Print the pin of a signing key; make the key if there is none", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			k, err := readKey(args[0])
			if errors.Is(err, fs.ErrNotExist) {
				k, err = makeKey(args[0])
			}
			if err != nil {
				return usage(err)
			}
			_, err = fmt.Fprintln(c.stdout, policyset.KeyOf(k.Public().(ed25519.PublicKey)))
			return err
		},
	}
}

func readKey(file string) (ed25519.PrivateKey, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key %s may be read by others (mode %04o): chmod 600 it", file, info.Mode().Perm())
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	k, err := policyset.ParsePrivate(b)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", file, err)
	}
	return k, nil
}

func makeKey(file string) (ed25519.PrivateKey, error) {
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	b, err := policyset.EncodePrivate(k)
	if err != nil {
		return nil, err
	}
	return k, daemon.WriteFile(file, b, 0o600)
}

// policySign is "sallyport policy sign".
func (c *cli) policySign(td *string) *cobra.Command {
	var keys []string
	var out, previous, file string
	var revision uint64
	cmd := &cobra.Command{
		Use: "sign DIR|SET", Short: "Make a folder a set of one file and sign it, or add a signature to a set", Args: cobra.ExactArgs(1),
		Long: "Make a folder of policies a set: one canonical file with a revision and the hash\n" +
			"of the set before it, signed by Ed25519 keys. The folder is checked and its tests\n" +
			"are run; a red one refuses. Given a set, add signatures to it: its hash stays.\n" +
			"What is signed is recorded before, as by policy push: no two sets under one revision.",
		RunE: func(_ *cobra.Command, args []string) error {
			if len(keys) == 0 {
				return usage(errors.New("--key is missing: name the file of a key, which sallyport policy key FILE makes"))
			}
			info, err := os.Stat(args[0])
			if err != nil {
				return usage(err)
			}
			var s *policyset.Signed
			switch {
			case !info.IsDir() && (revision != 0 || previous != ""):
				return usage(fmt.Errorf("%s is a set, whose revision and previous stand: leave out --revision and --previous", args[0]))
			case !info.IsDir():
				if out == "" {
					out = args[0]
				}
				s, err = readSet(args[0])
			case out == "":
				return usage(errors.New("--out is missing: name the file of the set to make"))
			default:
				s, err = packed(args[0], *td, revision, previous)
			}
			if err != nil {
				return err
			}
			with, err := readSigners(keys)
			if err != nil {
				return err
			}
			rec, err := openRecord(file)
			if err != nil {
				return err
			}
			defer rec.Close()
			if err := rec.sign(s, with, signedOnly); err != nil {
				return err
			}
			if err := rec.save(); err != nil {
				return failed(fmt.Errorf("nothing is signed: %w", err))
			}
			if err := daemon.WriteFile(out, s.Encode(), 0o644); err != nil {
				return failed(err)
			}
			return c.printSet(s)
		},
	}
	cmd.Flags().StringSliceVar(&keys, "key", nil, "the file of a private key (PKCS#8, PEM, mode 0600), may be repeated")
	cmd.Flags().StringVar(&file, "record", "", "the file that remembers what is signed (default: ~/.local/state/"+recordFile+")")
	cmd.Flags().StringVar(&out, "out", "", "the file of the set (default: the set that is signed)")
	cmd.Flags().Uint64Var(&revision, "revision", 0, "the revision of the new set: greater than that of every set before")
	cmd.Flags().StringVar(&previous, "previous", "", "the hash of the set before; none for the first")
	return cmd
}

// packed makes a set of a folder that passes every check.
func packed(dir, td string, revision uint64, previous string) (*policyset.Signed, error) {
	if revision == 0 {
		return nil, usage(errors.New("--revision is missing: a set is numbered, from 1; write one more than that of the set before"))
	}
	p, err := parsePolicies(dir, td)
	if err != nil {
		return nil, err
	}
	files, err := policyset.Pack(os.DirFS(dir))
	if err != nil {
		return nil, failed(err)
	}
	s, err := policyset.New(policyset.Set{
		TrustDomain: p.TrustDomain, Revision: revision, Previous: previous, Created: time.Now().UTC().Truncate(time.Second), Files: files,
	})
	if err != nil {
		return nil, usage(err)
	}
	// What is signed is what was read last, not what was looked at first.
	return s, checkedSet(s)
}

// checkedSet says what is wrong with the policies in a set.
func checkedSet(s *policyset.Signed) error {
	p, err := s.Policies()
	if err != nil {
		return failed(err)
	}
	c, err := mesh.Check(p, nil)
	if err == nil {
		err = review.Red(c)
	}
	return failed(err)
}

func readSet(file string) (*policyset.Signed, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, usage(err)
	}
	s, err := policyset.Parse(b)
	if err != nil {
		return nil, failed(fmt.Errorf("%s: %w", file, err))
	}
	return s, checkedSet(s)
}

// policyVerify is "sallyport policy verify".
func (c *cli) policyVerify() *cobra.Command {
	var pins []string
	var threshold int
	cmd := &cobra.Command{
		Use: "verify SET", Short: "Check a set: its form, its policies and tests, and who signed it", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			var signers policyset.Signers
			for _, p := range pins {
				signers.Keys = append(signers.Keys, policyset.Key(p))
			}
			signers.Threshold = threshold
			if err := signers.Validate(); err != nil {
				return usage(err)
			}
			s, err := readSet(args[0])
			if err == nil && signers.Pinned() {
				err = failed(signers.Verify(s))
			}
			if err != nil {
				return err
			}
			return c.printSet(s)
		},
	}
	cmd.Flags().StringArrayVar(&pins, "pin", nil, "a key that may sign, as sallyport policy key prints it, may be repeated")
	cmd.Flags().IntVar(&threshold, "threshold", 0, "how many of them must have signed (default: all)")
	return cmd
}

// printSet says which set it is and whose signatures on it are good.
func (c *cli) printSet(s *policyset.Signed) error {
	by := s.Keys()
	if c.format == "json" {
		if by == nil {
			by = []policyset.Key{}
		}
		return c.emit(map[string]any{
			"trust_domain": s.TrustDomain, "revision": s.Revision, "hash": s.Hash(), "previous": s.Previous, "created": s.Created, "signed_by": by,
		}, nil, nil)
	}
	names := make([]string, len(by))
	for i, k := range by {
		names[i] = string(k)
	}
	_, err := fmt.Fprintf(c.stdout, "revision %d of %s, hash %s, %d files\nsigned by %s\n", s.Revision, s.TrustDomain, s.Hash(), len(s.Files), strings.Join(names, ", "))
	return err
}
