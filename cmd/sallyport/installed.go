package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

// The programs that serve.
const (
	issuerProgram  = "issuer"
	gatewayProgram = "gateway"
	sidecarProgram = "sidecar"
)

// An installed is a program that serves on this machine, by its configuration.
type installed struct {
	program string // issuer, gateway or sidecar
	config  string // its file
	path    string // the program's own
	settings
	// err says why settings are not known.
	err error
}

// name tells it from others: sidecar, or sidecar-web for sidecar-web.yaml.
func (i *installed) name() string { return strings.TrimSuffix(filepath.Base(i.config), ".yaml") }

func (i *installed) adminSocket() string { return filepath.Join(i.RunDir, "admin.sock") }

// settings are what the CLI reads of the configuration of any program.
type settings struct {
	TrustDomain string `json:"trust_domain"`
	DataDir     string `json:"data_dir"`
	RunDir      string `json:"run_dir"`
	Listen      string `json:"listen"`
	Policies    string `json:"policies"`
	Issuer      struct {
		Addresses     []string `json:"addresses"`
		Bundle        string   `json:"bundle"`
		JoinTokenFile string   `json:"join_token_file"`
		Attest        struct {
			Kind    string `json:"kind"`
			KeyFile string `json:"key_file"`
		} `json:"attest"`
	} `json:"issuer"`
	CA struct {
		PassphraseFile string `json:"passphrase_file"`
		KMS            string `json:"kms"`
		Upstream       struct {
			Kind    string `json:"kind"`
			KeyFile string `json:"key_file"`
		} `json:"upstream"`
	} `json:"ca"`
	Page struct {
		KeyFile string `json:"key_file"`
		OIDC    struct {
			SecretFile string `json:"secret_file"`
		} `json:"oidc"`
	} `json:"page"`
	Database struct {
		URL string `json:"url"`
	} `json:"database"`
	Inbound  struct{ Listen string } `json:"inbound"`
	Outbound struct{ Listen string } `json:"outbound"`
	Capture  struct {
		Table    string   `json:"table"`
		Everyone bool     `json:"everyone"`
		Users    []string `json:"users"`
		Cgroups  []string `json:"cgroups"`
	} `json:"capture"`
	Names struct {
		Listen   string `json:"listen"`
		SelfTest string `json:"self_test"`
	} `json:"names"`
	Limits struct {
		Connections int `json:"connections"`
	} `json:"limits"`
	Audit struct {
		Spool struct {
			MaxBytes int64 `json:"max_bytes"`
		} `json:"spool"`
	} `json:"audit"`
}

func (s *settings) captures() bool {
	return s.Capture.Everyone || len(s.Capture.Users)+len(s.Capture.Cgroups) > 0
}

// programPath finds a program: beside this one, else as a shell does.
func programPath(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(self), name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return exec.LookPath(name)
}

// findInstalled reads the configurations in a directory: issuer.yaml, and those
// whose names begin with gateway and sidecar.
func findInstalled(ctx context.Context, dir string) ([]*installed, error) {
	var out []*installed
	for _, program := range []string{issuerProgram, gatewayProgram, sidecarProgram} {
		files, err := filepath.Glob(filepath.Join(dir, program+"*.yaml"))
		if err != nil {
			return nil, usage(fmt.Errorf("--dir: %w", err))
		}
		for _, f := range files {
			rest := strings.TrimPrefix(filepath.Base(f), program)
			if rest != ".yaml" && (program == issuerProgram || rest[0] != '-') {
				continue
			}
			out = append(out, readInstalled(ctx, program, f))
		}
	}
	if len(out) == 0 {
		return nil, daemon.Hint(daemon.Exit(daemon.Usage, fmt.Errorf("no configuration is in %s: no issuer.yaml, gateway.yaml or sidecar.yaml", dir)), "name its directory with --dir, or make one: sallyport init, sallyport join")
	}
	return out, nil
}

// readInstalled has the program itself read its configuration.
func readInstalled(ctx context.Context, program, file string) *installed {
	i := &installed{program: program, config: file}
	if i.path, i.err = programPath(program); i.err != nil {
		i.err = fmt.Errorf("the program %s is not found: %w", program, i.err)
		return i
	}
	out, err := exec.CommandContext(ctx, i.path, "config", "show", "--json", "--config", file).Output()
	if e := (*exec.ExitError)(nil); errors.As(err, &e) {
		i.err = errors.New(strings.TrimPrefix(strings.TrimSpace(string(e.Stderr)), program+": "))
	} else if err != nil {
		i.err = err
	} else {
		i.err = json.Unmarshal(out, &i.settings)
	}
	return i
}

// pid is the number of the running process.
func (i *installed) pid() (int, error) {
	c, err := net.DialTimeout("unix", i.adminSocket(), 2*time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	cred, err := capture.PeerCred(c.(*net.UnixConn))
	return cred.PID, err
}

// get asks the running process on its admin socket.
func (i *installed) get(ctx context.Context, path string) (status int, body []byte, err error) {
	return askAdmin(ctx, 5*time.Second, http.MethodGet, i.adminSocket(), path)
}

// manage has the API of the running issuer asked, for a few seconds.
func (i *installed) manage(ctx context.Context, ask func(context.Context, *control.Admin) error) error {
	a, err := control.DialAdmin(filepath.Join(i.RunDir, "api.sock"))
	if err != nil {
		return err
	}
	defer a.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return ask(ctx, a)
}

// secrets are the files of a program that hold keys or tokens and are there:
// those in its state, and those that its configuration names.
func (i *installed) secrets() (files []string, err error) {
	own := []string{"node.key", "node.json", "svids.json", "issuer.db", "issuer.db-wal"}
	for _, name := range own {
		files = append(files, filepath.Join(i.DataDir, name))
	}
	keys, err := filepath.Glob(filepath.Join(i.DataDir, "ca", "*.key"))
	if err != nil {
		return nil, err
	}
	files = append(files, keys...)
	files = append(files, i.Issuer.JoinTokenFile, i.Issuer.Attest.KeyFile, i.CA.PassphraseFile, i.CA.Upstream.KeyFile, i.Page.KeyFile, i.Page.OIDC.SecretFile)
	return slices.DeleteFunc(files, func(f string) bool {
		_, err := os.Stat(f)
		return f == "" || errors.Is(err, os.ErrNotExist)
	}), nil
}
