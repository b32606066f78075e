// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/statefile"
	"github.com/sallyport-dev/sallyport/userspace/tpm"
)

// KeyOptions says where a CA's key lives.
type KeyOptions struct {
	Dir        string // made with mode 0700 where it does not exist
	Name       string // stem of the files: NAME.tpmkey, or NAME.key and NAME.secret
	TPM        string // "auto" (also ""), "none", or an address for tpm.Open
	RequireTPM bool   // no software key, neither an old nor a new one
	// SecretFile holds the 32 bytes that a software key is encrypted under;
	// "" is NAME.secret in Dir. See Key for what that is worth.
	SecretFile string
}

// Key is a CA's P-256 key.
//
// A key in a TPM (AnchorTPM) cannot be copied; root of the machine can use
// it while it runs. A software key (AnchorSoftware) is encrypted with
// AES-256-GCM under a secret in another file of mode 0600. That protects a
// copy of the one file without the other, such as a backup that leaves the
// secret out, or a secret kept on a tmpfs or handed over by systemd
// (LoadCredential). It does not protect against who can read both files as
// root, nor against a copy of the whole disk.
type Key struct {
	crypto.Signer
	Anchor flow.Anchor
	Place  string // the TPM's address and maker, or the key file
	tpm    *tpm.TPM
}

const tpmInfoTime = 5 * time.Second

// OpenKey opens the key or makes one: in the TPM where there is one, else in
// a file. What was made in one place is never silently made again in the
// other: a key in a TPM that is gone is an error.
func OpenKey(o KeyOptions) (*Key, error) {
	if o.TPM == "" {
		o.TPM = "auto"
	}
	if o.TPM == "none" && o.RequireTPM {
		return nil, fmt.Errorf("open key %s: requireTPM is set and tpm is none; set tpm to auto or to the TPM's path", o.Name)
	}
	if err := statefile.MakeDir(o.Dir); err != nil {
		return nil, err
	}
	wrapped, plain := filepath.Join(o.Dir, o.Name+".tpmkey"), filepath.Join(o.Dir, o.Name+".key")
	inTPM, err := statefile.Exists(wrapped)
	if err != nil {
		return nil, err
	}
	inFile, err := statefile.Exists(plain)
	if err != nil {
		return nil, err
	}
	switch {
	case inTPM && inFile:
		return nil, fmt.Errorf("open key: both %s and %s exist; remove the one that is not in use", wrapped, plain)
	case inTPM && o.TPM == "none":
		return nil, fmt.Errorf("open key: %s was made in a TPM and tpm is none; set tpm to auto or to the TPM's path, or remove the file to make a new key", wrapped)
	case inFile && o.RequireTPM:
		return nil, fmt.Errorf("open key: requireTPM is set and %s is a software key; remove the file to make a new key in the TPM", plain)
	case inFile:
		return openSoftwareKey(o, plain)
	case o.TPM == "none":
		return makeSoftwareKey(o, plain)
	}
	t, err := tpm.Open(o.TPM)
	if errors.Is(err, tpm.ErrNone) && !inTPM && !o.RequireTPM {
		return makeSoftwareKey(o, plain)
	}
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w; mend the TPM, or set tpm to none to use a software key", o.Name, err)
	}
	if inTPM {
		if err := statefile.CheckPrivate(wrapped); err != nil {
			t.Close()
			return nil, err
		}
	}
	k, err := t.Key(wrapped)
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("open key %s: %w", o.Name, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), tpmInfoTime)
	defer cancel()
	info, err := t.Info(ctx)
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("open key %s: %w", o.Name, err)
	}
	place := fmt.Sprintf("%s (%s %s)", t.Address(), info.Manufacturer, info.Vendor)
	return &Key{Signer: k, Anchor: flow.AnchorTPM, Place: place, tpm: t}, nil
}

// Close closes the TPM, if the key is in one.
func (k *Key) Close() error {
	if k.tpm == nil {
		return nil
	}
	return k.tpm.Close()
}

// Banner returns what to print loudly at start for a software key, "" for
// one in a TPM.
func (k *Key) Banner() string {
	if k.Anchor == flow.AnchorTPM {
		return ""
	}
	line := strings.Repeat("*", 78)
	return fmt.Sprintf(`%s
* NO TPM: the certificate authority's key is a software key,
*   %s
* Whoever can read this machine's disk as root can copy it and issue any
* identity that this authority may issue. Decisions say anchor=software.
* Give the machine a TPM 2.0 and remove the file to make a key that cannot
* be copied; set identity.requireTPM to refuse to run without one.
%s`, line, k.Place, line)
}

const (
	softMagic  = "sallyport software key 1\n"
	secretSize = 32
	maxKeyFile = 4096
)

func (o KeyOptions) secretFile() string {
	if o.SecretFile != "" {
		return o.SecretFile
	}
	return filepath.Join(o.Dir, o.Name+".secret")
}

func makeSoftwareKey(o KeyOptions, path string) (*Key, error) {
	secret, err := openSecret(o.secretFile(), true)
	if err != nil {
		return nil, err
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make software key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("make software key: %w", err)
	}
	aead, err := keyCipher(secret, o.Name)
	if err != nil {
		return nil, fmt.Errorf("make software key: %w", err)
	}
	sealed := aead.Seal([]byte(softMagic), nil, der, []byte(softMagic+o.Name))
	if err := statefile.Write(path, sealed); err != nil {
		return nil, fmt.Errorf("store software key: %w", err)
	}
	return &Key{Signer: private, Anchor: flow.AnchorSoftware, Place: path}, nil
}

func openSoftwareKey(o KeyOptions, path string) (*Key, error) {
	if err := statefile.CheckPrivate(path); err != nil {
		return nil, err
	}
	secret, err := openSecret(o.secretFile(), false)
	if err != nil {
		return nil, err
	}
	b, err := statefile.Read(path, maxKeyFile)
	if err != nil {
		return nil, fmt.Errorf("read software key: %w", err)
	}
	sealed, ok := bytes.CutPrefix(b, []byte(softMagic))
	if !ok {
		return nil, fmt.Errorf("open software key %s: not a key file; remove it to make a new key", path)
	}
	aead, err := keyCipher(secret, o.Name)
	if err != nil {
		return nil, fmt.Errorf("open software key: %w", err)
	}
	der, err := aead.Open(nil, nil, sealed, []byte(softMagic+o.Name))
	if err != nil {
		return nil, fmt.Errorf("open software key %s: it was encrypted under another secret than %s, or is damaged; restore the secret, or remove the key to make a new one", path, o.secretFile())
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("open software key %s: %w", path, err)
	}
	private, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("open software key %s: a %T, not an ECDSA key", path, parsed)
	}
	return &Key{Signer: private, Anchor: flow.AnchorSoftware, Place: path}, nil
}

// keyCipher derives the key of one name from the secret; the nonce is drawn
// anew by each Seal.
func keyCipher(secret []byte, name string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, secret, nil, softMagic+name, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func openSecret(path string, create bool) ([]byte, error) {
	if found, err := statefile.Exists(path); err != nil {
		return nil, err
	} else if !found {
		if !create {
			return nil, fmt.Errorf("open key secret %s: it does not exist; restore it, or remove the key to make a new one", path)
		}
		secret := make([]byte, secretSize)
		rand.Read(secret) // never fails, by its contract
		if err := statefile.Write(path, secret); err != nil {
			return nil, fmt.Errorf("store key secret: %w", err)
		}
		return secret, nil
	}
	if err := statefile.CheckPrivate(path); err != nil {
		return nil, err
	}
	secret, err := statefile.Read(path, maxKeyFile)
	if err != nil {
		return nil, fmt.Errorf("read key secret: %w", err)
	}
	if len(secret) < secretSize {
		return nil, fmt.Errorf("read key secret %s: %d bytes, must be at least %d", path, len(secret), secretSize)
	}
	return secret, nil
}
