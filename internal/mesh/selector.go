package mesh

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// selectorKinds are the facts that attestation can establish, each with the
// form of its value.
var selectorKinds = map[string]func(string) error{
	"unix:uid":               checkUint,
	"unix:gid":               checkUint,
	"unix:supplementary_gid": checkUint,
	"unix:user":              checkWord,
	"unix:group":             checkWord,
	"unix:path":              checkAbsolute,
	"unix:sha256":            checkSHA256,
	"cgroup:path":            checkAbsolute,
	"child":                  checkTrue,
	"child:sha256":           checkSHA256,
	"self":                   checkTrue,
	"systemd:unit":           checkUnit,
	"systemd:invocation":     checkInvocation,
	"container:id":           checkSHA256,
	"docker:id":              checkSHA256,
	"podman:id":              checkSHA256,
	"containerd:id":          checkSHA256,
	"k8s:container-id":       checkSHA256,
	"k8s:pod-uid":            checkPodUID,
	"k8s:ns":                 checkKubeName,
	"k8s:sa":                 checkKubeName,
	"k8s:pod-name":           checkKubeName,
	"k8s:node-name":          checkKubeName,
	"k8s:container-name":     checkKubeName,
	"k8s:container-image":    checkWords,
	"k8s:pod-label":          checkPodLabel,
}

// nodeID is the type of the selector that every agent has: its own SPIFFE ID.
const nodeID = "spiffe_id"

// nodeKinds are the types of the facts that node attestation establishes; the
// value is what the platform says.
var nodeKinds = map[string]func(string) error{
	"x509pop":    checkPlatform,
	"oidc":       checkPlatform,
	"k8s_psat":   checkPlatform,
	"aws_iid":    checkPlatform,
	"gcp_iit":    checkPlatform,
	"azure_imds": checkPlatform,
	nodeID:       checkAgent,
}

var (
	unitName   = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,240}\.(?:service|scope|socket|mount|swap)$`)
	invocation = regexp.MustCompile(`^[0-9a-f]{32}$`)
	podUID     = regexp.MustCompile(`^(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32})$`)
	kubeName   = regexp.MustCompile(`^[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?$`)
	kubeLabel  = regexp.MustCompile(`^(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?:(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$`)
)

// ParseSelector reads "type:value", such as "unix:uid:1000", "child:true" or
// "self:true", and of a node "x509pop:subject:cn:web-1". The type is what stands
// before the first colon.
func ParseSelector(s string) (Selector, error) {
	typ, value, ok := strings.Cut(s, ":")
	if !ok || typ == "" || value == "" {
		return Selector{}, fmt.Errorf("selector %q is not like unix:uid:1000", clip(s))
	}
	sel := Selector{Type: typ, Value: value}
	if err := sel.Check(); err != nil {
		return Selector{}, err
	}
	return sel, nil
}

// Check reports whether attestation knows this kind of fact and its value has
// the right form.
func (s Selector) Check() error {
	kind, value := s.Kind(), s.Value
	check, ok := nodeKinds[s.Type]
	if !ok {
		if kind != s.Type {
			_, value, _ = strings.Cut(s.Value, ":")
		}
		check, ok = selectorKinds[kind]
	}
	if !ok {
		return fmt.Errorf("unknown selector %q%s", clip(s.String()), didYouMean(kind, append(sortedKeys(selectorKinds), sortedKeys(nodeKinds)...)))
	}
	if err := check(value); err != nil {
		return fmt.Errorf("selector %q: %w", clip(s.String()), err)
	}
	return nil
}

// Kind is the selector without its value, such as "unix:uid" or "child".
func (s Selector) Kind() string {
	if name, _, ok := strings.Cut(s.Value, ":"); ok {
		return s.Type + ":" + name
	}
	return s.Type
}

// OfNode reports whether the selector is a fact of a node, not of a process.
func (s Selector) OfNode() bool { return nodeKinds[s.Type] != nil }

// Weak reports whether the selector names a program file only. Such a fact is
// true of every process that runs the file, whoever started it, so it is no
// boundary on its own.
func (s Selector) Weak() bool {
	switch s.Kind() {
	case "unix:path", "unix:sha256":
		return true
	}
	return false
}

func checkUint(v string) error {
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil || strconv.FormatUint(n, 10) != v {
		return fmt.Errorf("%q is not a number", v)
	}
	return nil
}

func checkWord(v string) error {
	if strings.ContainsAny(v, ": \t/") || v == "" {
		return fmt.Errorf("%q is not a name", v)
	}
	return nil
}

func checkAbsolute(v string) error {
	if !strings.HasPrefix(v, "/") || path.Clean(v) != v {
		return fmt.Errorf("%q is not an absolute path without detours", v)
	}
	return nil
}

func checkSHA256(v string) error {
	if b, err := hex.DecodeString(v); err != nil || len(b) != 32 || strings.ToLower(v) != v {
		return errors.New("want 64 lower-case hex digits")
	}
	return nil
}

func checkTrue(v string) error {
	if v != "true" {
		return errors.New(`only "true" is possible`)
	}
	return nil
}

func checkUnit(v string) error {
	if !unitName.MatchString(v) {
		return fmt.Errorf("%q is not a unit such as payment.service", clip(v))
	}
	return nil
}

func checkInvocation(v string) error {
	if !invocation.MatchString(v) {
		return errors.New("want 32 lower-case hex digits")
	}
	return nil
}

func checkPodUID(v string) error {
	if !podUID.MatchString(v) {
		return fmt.Errorf("%q is not the UID of a pod, with dashes", clip(v))
	}
	return nil
}

func checkKubeName(v string) error {
	if !kubeName.MatchString(v) {
		return fmt.Errorf("%q is not a name in Kubernetes: lower-case letters, digits, and . -", clip(v))
	}
	return nil
}

func checkPodLabel(v string) error {
	if !kubeLabel.MatchString(v) {
		return fmt.Errorf("%q is not a label, written key:value", clip(v))
	}
	return nil
}

func checkWords(v string) error {
	if v == "" || strings.ContainsAny(v, " \t") {
		return fmt.Errorf("%q has blanks", clip(v))
	}
	return nil
}

// maxPlatform is far above what clouds allow for a tag, bytes.
const maxPlatform = 1024

func checkPlatform(v string) error {
	if v == "" || len(v) > maxPlatform || strings.ContainsFunc(v, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("%q is not 1 to %d printable bytes", clip(v), maxPlatform)
	}
	return nil
}

func checkAgent(v string) error {
	if id, err := spiffeid.FromString(v); err != nil || id.String() != v || !strings.HasPrefix(id.Path(), agentPath) {
		return fmt.Errorf("%q is not the SPIFFE ID of an agent", clip(v))
	}
	return nil
}
